"""What dropping experts costs: loss and tasks beside the full model, with intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecollab.errors import DataError
from moecollab.evaluation.differences import LOSS, SIZE, SPEED, WRITTEN, differences
from moecollab.evaluation.evaluation import Evaluation
from moecollab.reporting.numbers import percent, signed

NAMES = {"caep": "CAEP", "reap": "REAP", "easy_ep": "EASY-EP"}
BASELINES = ("full", "before", "baseline", "original")
_NAME = re.compile(r"(?P<criterion>[a-z][a-z0-9_]*)-(?P<percent>\d{1,2})(?:-(?P<rest>.+))?")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Loss of one model on one domain (or all text) beside the full model's."""

    name: str
    """Name of the evaluation."""
    criterion: str
    drop: float | None
    """Fraction of experts that is gone, if known."""
    domain: str | None
    """None for all text."""
    documents: int
    loss: float
    difference: float
    low: float | None
    """Ends of the 95 % interval over documents; None for a single document."""
    high: float | None

    @property
    def label(self) -> str:
        """What it is called in figures and tables."""
        found = _NAME.fullmatch(self.name)
        return f"{self.short}, {found['percent']} % dropped" if found else self.name

    @property
    def short(self) -> str:
        """What it is called where the fraction is known."""
        found = _NAME.fullmatch(self.name)
        if found is None:
            return self.name
        return " · ".join(filter(None, (pretty(found["criterion"]), found["rest"])))

    @property
    def words(self) -> str:
        """The difference and its interval."""
        return f"{signed(self.difference)} nats {self.interval}".strip()

    @property
    def interval(self) -> str:
        """The interval in brackets, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"[{signed(self.low)}, {signed(self.high)}]"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One model's result on one task."""

    name: str
    task: str
    metric: str
    n: int
    value: float | None
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of all plans.

    Parameters
    ----------
    baseline : str
        Name of the evaluation of the full model.
    domains : tuple of str
        Domains of the held-out text.
    overall : tuple of Cost
        One per plan, by fraction dropped, then the cheapest first.
    by_domain : tuple of Cost
        One per plan and domain.
    full_loss : float
        Loss of the full model on all text, in nats per token.
    documents, tokens : int
        Size of the held-out text.
    tasks : tuple of TaskScore
        Results on lm-eval tasks, if any.
    """

    baseline: str
    domains: tuple[str, ...]
    overall: tuple[Cost, ...]
    by_domain: tuple[Cost, ...]
    full_loss: float
    documents: int
    tokens: int
    tasks: tuple[TaskScore, ...] = ()

    @property
    def drops(self) -> tuple[float, ...]:
        """Fractions dropped, ascending."""
        return tuple(sorted({cost.drop for cost in self.overall if cost.drop is not None}))

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria that were compared, in alphabetical order."""
        return tuple(sorted({cost.criterion for cost in self.overall}))

    @property
    def groups(self) -> tuple[tuple[str, tuple[Cost, ...]], ...]:
        """Plans that drop the same fraction, with a title."""
        found = [(f"{percent(drop)} of experts dropped", self.at(drop)) for drop in self.drops]
        others = tuple(cost for cost in self.overall if cost.drop is None)
        return (*found, ("other models", others)) if others else tuple(found)

    def at(self, drop: float) -> tuple[Cost, ...]:
        """Costs of the plans that drop this fraction, the cheapest first."""
        return tuple(cost for cost in self.overall if cost.drop == drop)

    def of(self, criterion: str, drop: float) -> Cost | None:
        """The cost of one criterion at this fraction; the middle one if there are several seeds."""
        found = [cost for cost in self.at(drop) if cost.criterion == criterion]
        return found[len(found) // 2] if found else None


def pretty(criterion: str) -> str:
    """A criterion's name as people write it."""
    return NAMES.get(criterion, criterion.replace("_", " "))


def costs_of(evaluations: Mapping[str, Evaluation]) -> Costs | None:
    """Costs of all evaluations against the full model; None when there is nothing to compare.

    The full model is the one that is called full (or before, baseline, original), or else the only
    one without a plan.
    """
    baseline = baseline_name(evaluations)
    if baseline is None:
        return None
    table = differences(evaluations, baseline=baseline)
    rows = [row for row in table.iter_rows(named=True) if row["measure"] == LOSS]
    first = [row for number, row in enumerate(rows) if _opens(rows, number)]
    inside = [row for number, row in enumerate(rows) if not _opens(rows, number)]
    full = next((row for row in first if row["model"] == baseline), None)
    if full is None:
        return None
    documents = evaluations[baseline].measured()
    overall = [_cost(row, evaluations, domain=None) for row in first if row["model"] != baseline]
    return Costs(
        baseline=baseline,
        domains=tuple(documents["domain"].unique().sort()),
        overall=tuple(sorted(overall, key=_by_drop_then_cost)),
        by_domain=tuple(
            _cost(row, evaluations, domain=row["domain"])
            for row in inside
            if row["model"] != baseline
        ),
        full_loss=full["value"],
        documents=documents.height,
        tokens=int(documents["tokens"].sum()),
        tasks=tuple(
            _task(row)
            for row in table.iter_rows(named=True)
            if row["measure"] not in (LOSS, WRITTEN, SPEED, SIZE)
        ),
    )


def baseline_name(evaluations: Mapping[str, Evaluation]) -> str | None:
    """Name of the full model's evaluation, or None when it cannot be told."""
    for name in BASELINES:
        if name in evaluations:
            return name
    unmasked = [name for name, found in evaluations.items() if found.plan is None]
    return unmasked[0] if len(unmasked) == 1 else None


def gap(evaluations: Mapping[str, Evaluation], first: Cost, second: Cost) -> Cost:
    """How much dearer `first` is than `second`, paired document by document."""
    pair = {cost.name: evaluations[cost.name] for cost in (first, second)}
    for row in differences(pair, baseline=second.name).iter_rows(named=True):
        if row["measure"] == LOSS and row["model"] == first.name:
            return _cost(row, evaluations, domain=None)
    raise DataError(f"{first.name} and {second.name} have no loss; evaluate both on a corpus")


def _opens(rows: list[dict[str, Any]], number: int) -> bool:
    """Whether a row is its model's first, which is over all documents."""
    return number == 0 or rows[number - 1]["model"] != rows[number]["model"]


def _cost(row: Mapping[str, Any], known: Mapping[str, Evaluation], domain: str | None) -> Cost:
    criterion, drop = _decision(row["model"], known[row["model"]])
    return Cost(
        name=row["model"],
        criterion=criterion,
        drop=drop,
        domain=domain,
        documents=row["n"],
        loss=row["value"],
        difference=row["difference"],
        low=row["difference_low"],
        high=row["difference_high"],
    )


def _decision(name: str, found: Evaluation) -> tuple[str, float | None]:
    """Criterion and fraction dropped: from the plan it was masked by, or from its name."""
    settings = (found.plan or {}).get("settings", {})
    if "criterion" in settings and "drop" in settings:
        return str(settings["criterion"]), float(settings["drop"])
    match = _NAME.fullmatch(name)
    return (match["criterion"], int(match["percent"]) / 100) if match else (name, None)


def _task(row: Mapping[str, Any]) -> TaskScore:
    return TaskScore(
        name=row["model"],
        task=row["measure"],
        metric=row["metric"],
        n=row["n"],
        value=row["value"],
        difference=row["difference"],
        low=row["difference_low"],
        high=row["difference_high"],
    )


def _by_drop_then_cost(cost: Cost) -> tuple[float, float, str]:
    return (2.0 if cost.drop is None else cost.drop, cost.difference, cost.name)
