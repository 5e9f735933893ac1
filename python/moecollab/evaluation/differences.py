"""Comparison of evaluations: paired differences against a baseline, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, MissingInputError, unknown_name
from moecollab.evaluation.evaluation import Evaluation
from moecollab.evaluation.intervals import Interval, paired_interval, ratio_interval
from moecollab.evaluation.tasks import TaskResult

LOSS, UNIT, EVERYWHERE = "loss", "nats per token", "all"
SCHEMA = {
    "model": pl.String,
    "measure": pl.String,
    "metric": pl.String,
    "domain": pl.String,
    "n": pl.Int64,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "relative": pl.Float64,
    "higher_is_better": pl.Boolean,
}


def differences(evaluations: Mapping[str, Evaluation], *, baseline: str = "full") -> pl.DataFrame:
    """What each model scored, and how far it is from the baseline on the same material.

    Differences are paired: document by document for the loss, question by question for tasks. Their
    intervals are 95 % percentile bootstrap over documents or questions, the same draws for every
    model. An interval over a single document is null, and so is a difference between tasks of which
    other questions were asked.

    Parameters
    ----------
    evaluations : mapping of name to Evaluation
        The baseline among them.
    baseline : str
        Name of the one to compare with.

    Returns
    -------
    DataFrame
        One row per model and measure: model, measure ("loss" or the task), metric, domain (or
        "all"), n (documents or questions), value, low, high, difference (value - baseline), its
        interval, relative (difference / baseline), higher_is_better. The baseline comes first.

    Raises
    ------
    SettingsError
        When the baseline is not among the evaluations.
    DataError
        When losses were measured on other documents, tokens or windows.
    """
    if baseline not in evaluations:
        raise unknown_name("baseline", baseline, list(evaluations))
    base = evaluations[baseline]
    order = [baseline, *(name for name in evaluations if name != baseline)]
    rows: list[dict[str, Any]] = []
    for name in order:
        found = evaluations[name]
        rows += _loss_rows(name, found, base)
        rows += _task_rows(name, found, base)
    if not rows:
        raise MissingInputError("the evaluations measured nothing; evaluate with a corpus or tasks")
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _loss_rows(name: str, found: Evaluation, base: Evaluation) -> Iterator[dict[str, Any]]:
    """Loss on all documents and on each domain."""
    if found.documents is None:
        return
    paired = None if base.documents is None else _paired(name, found, base)
    yield _loss_row(name, EVERYWHERE, found.documents, paired, base.seed)
    domains = found.documents["domain"].unique().sort().to_list()
    for domain in domains if len(domains) > 1 else ():
        inside = found.documents["domain"] == domain
        part = None if paired is None else paired.filter(inside)
        yield _loss_row(name, domain, found.documents.filter(inside), part, base.seed)


def _paired(name: str, found: Evaluation, base: Evaluation) -> pl.DataFrame:
    """The baseline's documents, which must be the very same in the same windows."""
    mine, theirs = found.measured(), base.measured()
    for part, key in (("inputs", "corpus"), ("settings", "context")):
        first, second = (about.get(part, {}).get(key) for about in (found.about, base.about))
        if first != second:
            raise DataError(
                f"{name!r} was measured with {key} {first} but the baseline with {second}; "
                "evaluate both alike"
            )
    columns = ["document", "domain", "tokens"]
    if not mine.select(columns).equals(theirs.select(columns)):
        raise DataError(
            f"{name!r} and the baseline have other documents or tokens; evaluate both on the same "
            "corpus with the same tokenizer"
        )
    return theirs


def _loss_row(
    name: str, domain: str, mine: pl.DataFrame, theirs: pl.DataFrame | None, seed: int
) -> dict[str, Any]:
    nll, size = _column(mine, "nll"), _column(mine, "tokens")
    reference = None if theirs is None else _column(theirs, "nll")
    row = {"model": name, "measure": LOSS, "metric": UNIT, "domain": domain, "n": mine.height}
    return row | {"higher_is_better": False} | _numbers(nll, size, reference, seed)


def _task_rows(name: str, found: Evaluation, base: Evaluation) -> Iterator[dict[str, Any]]:
    """Each task, paired with the baseline where both answered the same questions."""
    known = {_key(result): result for result in base.tasks}
    for result in found.tasks:
        other = known.get(_key(result))
        row = {
            "model": name,
            "measure": result.task,
            "metric": result.metric
            if result.filter == "none"
            else f"{result.metric} ({result.filter})",
            "domain": EVERYWHERE,
            "n": result.n,
            "higher_is_better": result.higher_is_better,
        }
        yield row | _task_numbers(result, other, base.seed)


def _task_numbers(result: TaskResult, other: TaskResult | None, seed: int) -> dict[str, Any]:
    if not result.values:
        alone = _numbers(np.zeros(1), np.ones(1), None, seed)
        return alone | {"value": result.value}
    values = np.asarray(result.values, dtype=np.float64)
    same = other is not None and other.values and result.asked_as(other)
    reference = np.asarray(other.values, dtype=np.float64) if other is not None and same else None
    return _numbers(values, np.ones_like(values), reference, seed)


def _numbers(
    total: NDArray[np.float64],
    size: NDArray[np.float64],
    reference: NDArray[np.float64] | None,
    seed: int,
) -> dict[str, float | None]:
    """A ratio of sums, its difference from the reference, and the intervals of both."""
    low, high = _ends(ratio_interval(total, size, seed=seed))
    value = float(total.sum() / size.sum())
    row: dict[str, float | None] = {"value": value, "low": low, "high": high}
    gap = dict.fromkeys(("difference", "difference_low", "difference_high", "relative"))
    if reference is None:
        return row | gap
    before = float(reference.sum() / size.sum())
    low, high = _ends(paired_interval(total, reference, size, seed=seed))
    return row | {
        "difference": value - before,
        "difference_low": low,
        "difference_high": high,
        "relative": (value - before) / before if before else None,
    }


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _column(table: pl.DataFrame, name: str) -> NDArray[np.float64]:
    return table[name].to_numpy().astype(np.float64)


def _key(result: TaskResult) -> tuple[str, str, str]:
    return result.task, result.metric, result.filter
