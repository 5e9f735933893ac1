"""Everything a report is made from, found in a run's folder or given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeAlias, TypeVar

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError, MissingInputError, StaleInputError
from moecollab.evaluation.evaluation import Evaluation, load_evaluation
from moecollab.patterns.collaboration import Collaboration
from moecollab.patterns.storage import load_collaboration
from moecollab.pruning.plans import Plan, load_plan
from moecollab.record.activations import Activations, load_activations

FilePath: TypeAlias = str | PathLike[str]
GivenScores: TypeAlias = Scores | FilePath | Iterable[Scores | FilePath]
GivenEvaluations: TypeAlias = (
    Evaluation | FilePath | Mapping[str, Evaluation | FilePath] | Iterable[Evaluation | FilePath]
)
Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What there is to report; any part may be missing."""

    activations: Activations | None = None
    collaboration: Collaboration | None = None
    scores: tuple[Scores, ...] = ()
    plan: Plan | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses nothing at all, and parts that do not belong together."""
        parts = (self.activations, self.collaboration, self.plan, *self.scores)
        if not self.evaluations and all(part is None for part in parts):
            raise MissingInputError(
                "there is nothing to report; give a run folder that holds activations, a "
                "collaboration, a plan or evaluations, or pass these themselves"
            )
        for what, part in (("collaboration", self.collaboration), ("plan", self.plan)):
            self._check_origin(what, None if part is None else part.activations)
        for scores in self.scores:
            self._check_origin("file of scores", scores.activations)

    def _check_origin(self, what: str, origin: str | None) -> None:
        if origin is None or self.activations is None:
            return
        digest = self.activations.digest()
        if origin != digest:
            raise StaleInputError(
                f"the {what} was made from activations {origin}, but the report has {digest}; "
                f"make the {what} again or give the activations it was made from"
            )


def gather(
    run: FilePath | None,
    *,
    activations: Activations | FilePath | None = None,
    collaboration: Collaboration | FilePath | None = None,
    scores: GivenScores | None = None,
    plan: Plan | FilePath | None = None,
    evaluations: GivenEvaluations | None = None,
) -> Material:
    """What is given, and what the run's folder holds of the rest."""
    folder = None if run is None else Path(run)
    if folder is not None and not folder.is_dir():
        raise DataError(f"run {folder} is not a folder; give the folder that holds the results")
    return Material(
        activations=_one(activations, _inside(folder, "activations"), load_activations),
        collaboration=_one(collaboration, _inside(folder, "collaboration"), load_collaboration),
        scores=_scores(_files(folder, "scores", "*.parquet") if scores is None else scores),
        plan=_one(plan, _plan_file(folder), load_plan),
        evaluations=_evaluations(
            _files(folder, "evaluations", "*.json") if evaluations is None else evaluations
        ),
    )


def _one(
    given: Thing | FilePath | None, found: Path | None, load: Callable[[FilePath], Thing]
) -> Thing | None:
    """The thing itself, loaded if a path stands for it."""
    chosen = found if given is None else given
    return load(chosen) if isinstance(chosen, str | PathLike) else chosen


def _inside(folder: Path | None, name: str) -> Path | None:
    """A part of the run, if it is there."""
    return folder / name if folder is not None and (folder / name).exists() else None


def _files(folder: Path | None, name: str, pattern: str) -> list[FilePath]:
    return [] if folder is None else list(sorted((folder / name).glob(pattern)))


def _plan_file(folder: Path | None) -> Path | None:
    """The chosen plan, or else the smallest cut by coverage, or else the first plan there is."""
    lone = _inside(folder, "plan.json")
    if lone is not None:
        return lone
    plans = [Path(path) for path in _files(folder, "plans", "*.json")]
    return min(
        plans, key=lambda path: (not path.stem.startswith("coverage-"), path.stem), default=None
    )


def _scores(given: GivenScores) -> tuple[Scores, ...]:
    many = [given] if isinstance(given, Scores | str | PathLike) else list(given)
    return tuple(one if isinstance(one, Scores) else load_scores(one) for one in many)


def _evaluations(given: GivenEvaluations) -> dict[str, Evaluation]:
    """Evaluations by name: the one given, the file's, or the evaluation's own."""
    if isinstance(given, Mapping):
        return {str(name): _evaluation(one) for name, one in given.items()}
    if isinstance(given, str | PathLike) and Path(given).is_dir():
        given = _files(Path(given).parent, Path(given).name, "*.json")
    many = [given] if isinstance(given, Evaluation | str | PathLike) else list(given)
    return {
        one.name if isinstance(one, Evaluation) else Path(one).stem: _evaluation(one)
        for one in many
    }


def _evaluation(one: Evaluation | FilePath) -> Evaluation:
    return one if isinstance(one, Evaluation) else load_evaluation(one)
