"""How sure scores and plans are: the same criterion on resampled documents and recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecollab import criteria
from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.criteria.scores import Scores
from moecollab.criteria.scoring import score
from moecollab.criteria.spread import Spread
from moecollab.errors import SHARE, MissingInputError, SettingsError, ShapeError
from moecollab.manifest import refuse_existing
from moecollab.patterns.collaboration import Collaboration
from moecollab.progress import track
from moecollab.pruning.budgets import Budget, Per
from moecollab.pruning.draws import READ, Source, drawn_evidence, sources_of
from moecollab.pruning.pairs import Patterns, Recorded, check_folds, open_pairs
from moecollab.pruning.planning import decide
from moecollab.record.activations import Activations
from moecollab.record.tallies import Tallies
from moecollab.settings import check_whole, is_real


def uncertainty(  # noqa: PLR0913 (a budget, and how to resample)
    criterion: str,
    activations: Recorded | Sequence[Recorded],
    *,
    collaboration: Patterns | Sequence[Patterns] | None = None,
    drop: float | None = None,
    experts: int | None = None,
    mass: float | None = None,
    per: Per = "layer",
    floor: int = 0,
    folds: int | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores with what they and a plan would be on other documents like these.

    Documents are put into folds at random, alike in number; folds are drawn with replacement, and
    the criterion and the plan are made again of those drawn (Efron 1979, by groups of documents).
    The model does not run again. Criteria of sums read the sums over the folds drawn; those of
    single tokens read the tokens of their documents, a document that was drawn twice being there
    twice; those of patterns read patterns as those documents use them, the dictionary as fitted.

    With several recordings, of other seeds or texts, recordings are drawn first and then the folds
    of each, so that what differs between them counts too. Sums are added up over recordings; scores
    by tokens or patterns are means over recordings, or over fits of one recording.

    Parameters
    ----------
    criterion : str
        Name of a criterion that recordings answer, and patterns fitted on them; not one that reads
        parameters or runs the model.
    activations : Activations or path, or a sequence of them
        Recordings of one model with single tokens.
    collaboration : Collaboration or path, or a sequence of them, optional
        Patterns, for criteria that need them: one fit of each recording in the same order, or
        several of one recording, such as of other seeds, which are drawn then.
    drop, experts, mass, per, floor
        The budget of the plan, as :func:`moecollab.plan` takes it.
    folds : int, optional
        Folds of each recording, in [2, number of its documents]. If None, those that it was made
        with (``extract(folds=…)``), which no others can replace for what is summed while recording
        only; else 64, or one per document. A standard error from n of them is itself off by about
        1 / sqrt(2 n) of it.
    resamples : int
        Draws, ≥ 2.
    confidence : float
        Part of the resampled scores between `low` and `high`, in (0, 1).
    seed : int
        Seed of the draws, and of folds that the recording has not been made with; criteria that
        draw take another one in each resample.
    out : path, optional
        Parquet file to write, which `plan` reads as any scores.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Scores
        Those of all documents together, with `spread`.

    Raises
    ------
    SettingsError
        When the criterion reads parameters or runs the model, patterns and recordings do not pair,
        or a recording cannot have so many folds.
    MissingInputError
        When what it reads was not recorded, or its sums were not by fold and single tokens do not
        hold them.
    DataError
        When a recording has one document.
    """
    chosen = criteria.get(criterion)
    _check_settings(folds, resamples, confidence, seed)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    budget = Budget(drop=drop, experts=experts, mass=mass, per=per, floor=floor)
    _check_criterion(chosen, budget)
    recordings, patterns = open_pairs(chosen, activations, collaboration)
    for acts in recordings:
        check_folds(chosen, acts, folds)
    whole = _whole(chosen, recordings, patterns, budget, seed)
    sources = sources_of(chosen, recordings, patterns, folds, seed)
    values, kept = Resampler(chosen, whole, budget, sources).run(resamples, seed)
    n_folds = [source.n_folds for source in sources]
    settings = {"resamples": resamples, "folds": n_folds, "seed": seed, "confidence": confidence}
    spread = _spread(values, kept, confidence, budget, settings | {"recordings": len(sources)})
    made = replace(whole, spread=spread)
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


def _spread(
    values: NDArray[np.float64],
    kept: NDArray[np.bool_],
    confidence: float,
    budget: Budget,
    settings: dict[str, object],
) -> Spread:
    """What draws say: (resamples, n_layers, n_experts) both arrays."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return Spread(
        standard_error=values.std(axis=0, ddof=1),
        low=low,
        high=high,
        kept_probability=kept.mean(axis=0),
        stability=float(np.mean(jaccard(kept[:-1:2], kept[1::2]))),
        budget=budget.as_json(),
        settings=settings,
    )


def jaccard(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Jaccard index of the kept experts of each layer.

    Arrays have shape (…, n_layers, n_experts), the result (…, n_layers).

    Examples
    --------
    >>> jaccard(np.array([[True, True, False]]), np.array([[False, True, True]])).round(3).tolist()
    [0.333]
    """
    both = (first & second).sum(axis=-1)
    either = (first | second).sum(axis=-1)
    index: NDArray[np.float64] = both / np.maximum(either, 1)
    return index


@dataclass(frozen=True)
class Resampler:
    """A criterion and a budget on documents that are drawn fold by fold.

    Parameters
    ----------
    criterion : Criterion
        What is scored by.
    whole : Scores
        Scores of all folds together.
    budget : Budget
        What stays.
    sources : list of Source
        The recordings in folds.
    """

    criterion: Criterion
    whole: Scores
    budget: Budget
    sources: list[Source]

    def run(self, resamples: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Scores and kept experts of each draw, (resamples, n_layers, n_experts) both."""
        rng = np.random.default_rng(seed)
        values = np.empty((resamples, *self.whole.values.shape))
        kept = np.empty(values.shape, dtype=np.bool_)
        with track("resample", resamples) as bar:
            for number in range(resamples):
                values[number] = self._scored(rng, seed + 1 + number)
                kept[number] = decide(replace(self.whole, values=values[number]), self.budget)
                bar.advance(1)
        return values, kept

    def _scored(self, rng: np.random.Generator, seed: int) -> NDArray[np.float64]:
        """Scores of one draw."""
        plain = Evidence(
            tallies=self.sources[0].sums,
            top_k=self.whole.top_k,
            drop=self.budget.drop or Evidence.drop,
            seed=seed,
            experts_per_layer=self.whole.experts_per_layer,
        )
        shown = drawn_evidence(self.criterion, self.sources, plain, rng)
        return _mean([self.criterion.function(one) for one in shown])


def _mean(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return values[0] if len(values) == 1 else np.mean(values, axis=0)


def _whole(
    criterion: Criterion,
    recordings: Sequence[Activations],
    patterns: Sequence[Collaboration | None],
    budget: Budget,
    seed: int,
) -> Scores:
    """Scores of all documents of all recordings."""
    drop = budget.drop or Evidence.drop
    each = [
        score(criterion.name, acts, collaboration=collab, drop=drop, seed=seed)
        for acts, collab in zip(recordings, patterns, strict=True)
    ]
    first = each[0]
    if len(each) == 1:
        return first
    for other, acts in zip(each, recordings, strict=True):
        if (other.layers, other.counts_of_experts, other.top_k) != (
            first.layers,
            first.counts_of_experts,
            first.top_k,
        ):
            raise ShapeError(f"{acts.path} is not of the same model; resample recordings of one")
    same = len({one.activations for one in each}) == 1
    if criterion.needs & READ:
        values = _mean([one.values for one in each])
        counts = first.counts if same else np.sum([one.counts for one in each], axis=0)
    else:
        by_domain = reduce(Tallies.merge, [acts.tallies() for acts in recordings])
        evidence = Evidence(
            tallies=by_domain.total(),
            by_domain=by_domain,
            top_k=first.top_k,
            drop=drop,
            seed=seed,
            experts_per_layer=first.experts_per_layer,
        )
        values, counts = criterion.function(evidence), evidence.tallies.count
    origin = first.activations if same else None
    return replace(first, values=values, counts=counts, activations=origin)


def _check_criterion(criterion: Criterion, budget: Budget) -> None:
    allowed = "one that a recording answers (routing, outputs, tokens, patterns)"
    if Needs.MODEL in criterion.needs:
        advice = "to see how it varies, score it on several texts and compare them with agreement"
        raise SettingsError(
            "criterion", criterion.name, f"{allowed}, and this runs the model; {advice}"
        )
    if Needs.WEIGHTS in criterion.needs:
        advice = "other documents change nothing in them: score and plan as it is"
        raise SettingsError(
            "criterion", criterion.name, f"{allowed}, and this reads parameters; {advice}"
        )
    if not budget.amount:
        raise MissingInputError(f"how much goes is not said; give drop ({SHARE}), experts or mass")
    if criterion.by_drop and budget.drop is None:
        raise SettingsError(
            "budget", budget.amount, f"drop for {criterion.name}, which ranks for one share"
        )
    budget.check_scores_suffice("for resampled plans")


def _check_settings(folds: int | None, resamples: int, confidence: float, seed: int) -> None:
    if folds is not None:
        check_whole("folds", folds, 2)
    check_whole("resamples", resamples, 2)
    check_whole("seed", seed, 0)
    if not is_real(confidence) or not 0 < confidence < 1:
        raise SettingsError("confidence", confidence, "in (0, 1)")
