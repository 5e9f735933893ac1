"""Dropping a part at a time: record, score, plan, mask, and again on what is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from moecollab import criteria
from moecollab.criteria.base import Criterion, Needs
from moecollab.criteria.scores import Scores, load_scores
from moecollab.criteria.scoring import score
from moecollab.embedded import located
from moecollab.errors import DataError, SettingsError, StaleInputError
from moecollab.manifest import MANIFEST, manifest, read_json, refuse_existing, write_json
from moecollab.models.keep import read_keep
from moecollab.models.loading import ModelLike, digest_model, load_model
from moecollab.models.masked import Mask, read_masked
from moecollab.patterns.dictionary import HSDL, Collaboration, load_collaboration
from moecollab.progress import say
from moecollab.pruning.budgets import Budget, Per
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.sites import Named, sorted_sites, with_text_keys
from moecollab.record.activations import Activations, load_activations
from moecollab.record.corpus import Corpus, Source, read_corpus
from moecollab.record.extraction import extract

KIND, FORMAT = "iteration", 1
PLAN = "plan.json"
_UNMASKED = Needs.MODEL | Needs.PROBABILITY | Needs.PREFERENCES
"""What cannot be had of a masked model."""


def iterate(  # noqa: PLR0913 (it records, scores and plans)
    model: ModelLike,
    corpus: Source,
    criterion: str,
    *,
    drop: float,
    out: str | PathLike[str],
    rounds: int = 4,
    per: Per = "layer",
    floor: int = 0,
    keep: Named = None,
    tokens: int | None = None,
    context: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    overwrite: bool = False,
    hsdl: HSDL | None = None,
    tokenizer: Any = None,  # noqa: ANN401 (transformers is untyped)
) -> Plan:
    """A plan that is made in rounds, each on a recording of the model as the last one left it.

    What an expert is worth depends on which others are there. Every round records the masked model,
    scores the experts and drops up to its share of `drop`; what went before stays gone. A run that
    was stopped goes on with the round, and within a recording with the shard, where it was.

    Parameters
    ----------
    model : Module, path or hub name
        The whole model. A loaded one is masked while rounds run, and needs `tokenizer`.
    corpus : path, dataset or iterable
        The text of every round.
    criterion : str
        Name of any criterion that a recording, its patterns or the parameters answer; router
        probabilities of a masked model are not known.
    drop, per, floor, keep
        The budget at the end, as :func:`moecollab.plan` takes it.
    out : path
        Folder with ``plan.json`` and a folder for each round: activations, scores, plan.
    rounds : int
        Rounds, ≥ 1; after round r of n, r / n of `drop` is gone. With 1 it is score and plan.
    tokens, context, batch_size, dtype, tokenizer
        As :func:`moecollab.extract` takes them.
    seed : int
        Seed of the choice of text, and of a criterion that draws.
    overwrite : bool
        Whether a result in `out`, or rounds with other settings, may be replaced.
    hsdl : HSDL, optional
        How patterns are fitted in each round for criteria that need them; as is if None.

    Returns
    -------
    Plan
        On the ids of the whole model, with the scores of the last round.

    Raises
    ------
    SettingsError
        When the criterion runs the model or reads probabilities.
    PlanError
        When the budget of a round cannot be met.
    StaleInputError
        When `out` holds rounds of another model, text or other settings.
    """
    chosen, model = criteria.get(criterion), located(model)
    _check(chosen, model, rounds, Budget(drop=drop, per=per, floor=floor))
    protected = sorted_sites("keep", keep)
    folder, text = Path(out), read_corpus(corpus)
    refuse_existing(folder / PLAN, overwrite=overwrite)
    loaded, found = load_model(model, dtype)
    recording = {"tokens": tokens, "context": context, "batch_size": batch_size, "seed": seed}
    settings = {"criterion": criterion, "drop": drop, "rounds": rounds, "per": per, "floor": floor}
    settings |= {"keep": with_text_keys(protected)}
    settings |= {"hsdl": None if hsdl is None else str(asdict(hsdl))}
    inputs = {"model": digest_model(loaded), "corpus": text.digest}
    about = manifest(KIND, FORMAT, settings=settings | recording, inputs=inputs, seed=seed)
    _prepare(folder, about, overwrite=overwrite)
    driver = _Rounds(
        model=loaded,
        corpus=text,
        criterion=chosen,
        folder=folder,
        hsdl=hsdl or HSDL(),
        budget={"per": per, "floor": floor, "keep": protected},
        recording=recording | {"tokenizer": tokenizer or found},
        seed=seed,
    )
    made: Plan | None = None
    for number in range(1, rounds + 1):
        made = driver.run(number, drop * number / rounds if number < rounds else drop, made)
        say(f"round {number} of {rounds}: {made.n_dropped} of {made.n_sites} experts are gone")
    if made is None:
        raise SettingsError("rounds", rounds, "1 or more")
    made.save(folder / PLAN, overwrite=overwrite)
    return made


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """The rounds of one run: a loaded model, text, and a folder."""

    model: Any
    corpus: Corpus
    criterion: Criterion
    folder: Path
    hsdl: HSDL
    budget: dict[str, Any]
    recording: dict[str, Any]
    seed: int

    def run(self, number: int, drop: float, before: Plan | None) -> Plan:
        """The plan of one round, made unless it is there."""
        folder = self.folder / f"round-{number}"
        if (folder / PLAN).exists():
            return load_plan(folder / PLAN)
        folder.mkdir(parents=True, exist_ok=True)
        with self._masked(before):
            acts = self._recorded(folder / "activations")
        made = plan(
            self._scored(folder, acts, drop),
            drop=drop,
            drop_list=None if before is None else before.dropped,
            **self.budget,
        )
        listed = replace(made, drop_list={})  # nobody asked for it: layers may be equalised yet
        listed.save(folder / PLAN)
        return listed

    @contextmanager
    def _masked(self, before: Plan | None) -> Iterator[None]:
        """The model without what went in earlier rounds."""
        with nullcontext() if before is None else Mask(self.model, read_keep(before)):
            yield

    def _recorded(self, folder: Path) -> Activations:
        """The recording of this round."""
        if folder.exists():
            return load_activations(folder)
        wanted = criteria.collects(self.criterion.name)
        return extract(
            self.model,
            self.corpus,
            out=folder,
            norms=Needs.COLLABORATION in self.criterion.needs or set(wanted) != {"routing"},
            collect=[group for group in wanted if group not in ("routing", "norms")],
            **self.recording,
        )

    def _scored(self, folder: Path, acts: Activations, drop: float) -> Scores:
        """The scores of this round."""
        path = folder / "scores.parquet"
        if path.exists():
            return load_scores(path)
        return score(
            self.criterion.name,
            acts,
            model=self.model if Needs.WEIGHTS in self.criterion.needs else None,
            collaboration=self._patterns(folder, acts),
            drop=drop,
            seed=self.seed,
            out=path,
        )

    def _patterns(self, folder: Path, acts: Activations) -> Collaboration | None:
        """Patterns of this round, for a criterion that needs some."""
        if Needs.COLLABORATION not in self.criterion.needs:
            return None
        path = folder / "collaboration"
        if not path.exists():
            self.hsdl.fit(acts).save(path)
        return load_collaboration(path)


def _check(criterion: Criterion, model: ModelLike, rounds: int, budget: Budget) -> None:
    if rounds < 1:
        raise SettingsError("rounds", rounds, "1 or more")
    budget.check_scores_suffice("in rounds")
    if criterion.needs & _UNMASKED:
        raise SettingsError(
            "criterion",
            criterion.name,
            "one that a recording of a masked model answers: it runs the model itself or reads "
            "router probabilities",
        )
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise DataError(f"{model} is a masked model; give the model that it masks")


def _prepare(folder: Path, about: dict[str, Any], *, overwrite: bool) -> None:
    """Keeps the rounds of the same run in a folder; those of another are refused or removed."""
    note = folder / MANIFEST
    if note.is_file():
        before = read_json(note)
        if all(before.get(name) == about[name] for name in ("settings", "inputs", "seed")):
            if overwrite:
                _remove(folder)
            return
        if not overwrite:
            raise StaleInputError(
                f"{folder} holds rounds of another model, text or other settings; choose another "
                "folder, or pass overwrite=True (--overwrite) to start over"
            )
        _remove(folder)
    write_json(note, about, overwrite=True)


def _remove(folder: Path) -> None:
    """Removes the rounds in a folder, and nothing else."""
    for path in folder.glob("round-*"):
        shutil.rmtree(path)
    (folder / PLAN).unlink(missing_ok=True)
