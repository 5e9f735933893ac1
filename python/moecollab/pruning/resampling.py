"""How sure scores and plans are: the same criterion on resampled documents and recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab import criteria
from moecollab.criteria.base import SUMMED, Criterion, Evidence, Needs, groups_of
from moecollab.criteria.scores import Scores
from moecollab.criteria.scoring import score
from moecollab.criteria.spread import Spread
from moecollab.errors import SHARE, DataError, MissingInputError, SettingsError, ShapeError
from moecollab.manifest import refuse_existing
from moecollab.progress import track
from moecollab.pruning.budgets import Budget, Per
from moecollab.pruning.planning import decide
from moecollab.record.activations import Activations, load_activations
from moecollab.record.folding import folds_of
from moecollab.record.folds import SINGLE, tallies_by
from moecollab.record.sums import SUMS, names_of
from moecollab.record.tallies import Tallies

Recorded: TypeAlias = "Activations | str | PathLike[str]"


def uncertainty(  # noqa: PLR0913 (a budget, and how to resample)
    criterion: str,
    activations: Recorded | Sequence[Recorded],
    *,
    drop: float | None = None,
    experts: int | None = None,
    mass: float | None = None,
    per: Per = "layer",
    floor: int = 0,
    folds: int = 64,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores with what they and a plan would be on other documents like these.

    Documents are put into folds at random, alike in number; folds are drawn with replacement, and
    the criterion and the plan are made again from the sums over those drawn (Efron 1979, by groups
    of documents). Sums of parts add up, so the model does not run again. With several recordings,
    of other seeds or texts, recordings are drawn first and then the folds of each, so that what
    differs between them counts too.

    Parameters
    ----------
    criterion : str
        Name of a criterion that reads sums over tokens.
    activations : Activations or path, or a sequence of them
        Recordings of one model with single tokens.
    drop, experts, mass, per, floor
        The budget of the plan, as :func:`moecollab.plan` takes it.
    folds : int
        Folds of each recording that has none of its own (``extract(folds=…)``), ≥ 2, at most one
        per document. A standard error from n of them is itself off by about 1 / sqrt(2 n) of it.
    resamples : int
        Draws, ≥ 2.
    confidence : float
        Part of the resampled scores between `low` and `high`, in (0, 1).
    seed : int
        Seed of the folds and of the draws; criteria that draw take another one in each resample.
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
        When the criterion reads more than sums.
    MissingInputError
        When sums that it reads are neither in the tables of single tokens nor recorded by fold.
    """
    chosen = criteria.get(criterion)
    if chosen.needs & ~SUMMED or Needs.WEIGHTS in chosen.needs:
        raise SettingsError("criterion", criterion, "one that reads sums over tokens alone")
    _check_settings(folds, resamples, confidence)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    budget = Budget(drop=drop, experts=experts, mass=mass, per=per, floor=floor)
    if not budget.amount:
        raise MissingInputError(f"how much goes is not said; give drop ({SHARE}), experts or mass")
    budget.check_scores_suffice("for resampled plans")
    opened = _opened(activations)
    whole = _whole(criterion, opened, budget, seed)
    resampler = Resampler(chosen, whole, budget, _folded(chosen, opened, folds, seed))
    values, kept = resampler.run(resamples, seed)
    n_folds = [len(part.domains) for part in resampler.parts]
    settings = {"resamples": resamples, "folds": n_folds, "seed": seed, "confidence": confidence}
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    spread = Spread(
        standard_error=values.std(axis=0, ddof=1),
        low=low,
        high=high,
        kept_probability=kept.mean(axis=0),
        stability=float(np.mean(jaccard(kept[:-1:2], kept[1::2]))),
        budget=budget.as_json(),
        settings=settings | {"recordings": len(opened)},
    )
    made = replace(whole, spread=spread)
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


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
    """A criterion and a budget on sums that are drawn fold by fold.

    Parameters
    ----------
    criterion : Criterion
        What is scored by.
    whole : Scores
        Scores of all folds together.
    budget : Budget
        What stays.
    parts : list of Tallies
        Sums by fold of each recording.
    """

    criterion: Criterion
    whole: Scores
    budget: Budget
    parts: list[Tallies]

    def run(self, resamples: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Scores and kept experts of each draw, (resamples, n_layers, n_experts) both."""
        rng = np.random.default_rng(seed)
        values = np.empty((resamples, *self.whole.values.shape))
        kept = np.empty(values.shape, dtype=np.bool_)
        with track("resample", resamples) as bar:
            for number in range(resamples):
                drawn = self._drawn(rng)
                evidence = Evidence(
                    tallies=drawn,
                    top_k=self.whole.top_k,
                    drop=self.budget.drop or Evidence.drop,
                    seed=seed + 1 + number,
                )
                values[number] = self.criterion.function(evidence)
                kept[number] = ~self._gone(values[number])
                bar.advance(1)
        return values, kept

    def _drawn(self, rng: np.random.Generator) -> Tallies:
        """Sums over as many recordings and folds as there are, drawn with replacement."""
        chosen = rng.integers(0, len(self.parts), len(self.parts))
        drawn = []
        for number in chosen:
            part = self.parts[number]
            n_folds = len(part.domains)
            times = np.bincount(rng.integers(0, n_folds, n_folds), minlength=n_folds)
            drawn.append(_weighted(part, times))
        return reduce(Tallies.merge, drawn)

    def _gone(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return decide(replace(self.whole, values=values), self.budget)


def _weighted(part: Tallies, times: NDArray[np.int64]) -> Tallies:
    """The total of some folds, each as often as it was drawn."""
    found = {}
    for name, value in part.arrays.items():
        if SUMS[name].join == "peak":  # which token was highest is no sum
            continue
        if SUMS[name].join == "max":
            found[name] = value[times > 0].max(axis=0)
        else:
            found[name] = np.tensordot(times.astype(value.dtype), value, axes=1)
    return Tallies((), found)


def _folded(
    criterion: Criterion, opened: list[Activations], folds: int, seed: int
) -> list[Tallies]:
    """Sums by fold of what a criterion reads, of every recording."""
    groups = dict.fromkeys(("routing", *groups_of(criterion.needs)))
    found = []
    for acts in opened:
        n_folds = min(folds, acts.n_samples)
        if n_folds < 2:
            raise DataError(
                f"{acts.path} has {acts.n_samples} documents, of which no others can be drawn; "
                "record at least 2"
            )
        stored = acts.fold_tallies()
        if stored is not None:
            found.append(stored)
            continue
        if not set(groups) <= set(SINGLE):
            raise MissingInputError(
                f"{criterion.name} reads what is summed while recording only, and {acts.path} has "
                "no folds; extract again with folds=32 (--folds 32)"
            )
        part = folds_of(acts.n_samples, n_folds, seed=seed)
        found.append(tallies_by(acts, part, n_folds, groups))
    return _alike(found, names_of(groups))


def _alike(parts: list[Tallies], names: Sequence[str]) -> list[Tallies]:
    """The parts with those of some sums that all of them hold."""
    shared = [name for name in names if all(name in part.arrays for part in parts)]
    return [Tallies(part.domains, {name: part[name] for name in shared}) for part in parts]


def _whole(criterion: str, opened: list[Activations], budget: Budget, seed: int) -> Scores:
    """Scores of all documents of all recordings."""
    each = [score(criterion, acts, drop=budget.drop or Evidence.drop, seed=seed) for acts in opened]
    first = each[0]
    if len(opened) == 1:
        return first
    for other, acts in zip(each, opened, strict=True):
        if (other.layers, other.values.shape, other.top_k) != (
            first.layers,
            first.values.shape,
            first.top_k,
        ):
            raise ShapeError(f"{acts.path} is not of the same model; resample recordings of one")
    total = reduce(Tallies.merge, [acts.tallies().total() for acts in opened])
    drop = budget.drop or Evidence.drop
    evidence = Evidence(tallies=total, top_k=first.top_k, drop=drop, seed=seed)
    return replace(
        first,
        values=criteria.get(criterion).function(evidence),
        counts=total.count,
        activations=None,
    )


def _opened(given: Recorded | Sequence[Recorded]) -> list[Activations]:
    listed = [given] if isinstance(given, Activations | str | PathLike) else list(given)
    if not listed:
        raise DataError("there are no recordings; give at least one")
    return [one if isinstance(one, Activations) else load_activations(one) for one in listed]


def _check_settings(folds: int, resamples: int, confidence: float) -> None:
    if folds < 2:
        raise SettingsError("folds", folds, "2 or more")
    if resamples < 2:
        raise SettingsError("resamples", resamples, "2 or more")
    if not 0 < confidence < 1:
        raise SettingsError("confidence", confidence, "in (0, 1)")
