"""Comparison of evaluations: paired differences against a baseline, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, MissingInputError, unknown_name
from moecollab.evaluation.evaluation import Evaluation
from moecollab.evaluation.intervals import (
    RESAMPLES,
    Interval,
    paired_interval,
    percentiles,
    ratio_interval,
)
from moecollab.evaluation.repetition import distinct
from moecollab.evaluation.tasks import TaskResult

if TYPE_CHECKING:
    from moecollab.evaluation.usage import Usage

LOSS, UNIT, EVERYWHERE = "loss", "nats per token", "all"
WRITTEN, SPEED, SIZE = "written text", "speed", "size"
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

    Differences are paired: document by document for the loss, question by question for tasks,
    prompt by prompt for what was written. Their intervals are 95 % percentile bootstrap over
    documents, questions or prompts, the same draws for every model. An interval over a single
    document is null, and so are a difference between other questions or prompts, the interval of a
    size, that of distinct-2, which resampling makes smaller, and that of a difference of speeds:
    rounds share the load of their machine, so they do not tell how far it moves from run to run.

    Parameters
    ----------
    evaluations : mapping of name to Evaluation
        The baseline among them.
    baseline : str
        Name of the one to compare with.

    Returns
    -------
    DataFrame
        One row per model and measure: model, measure ("loss", the task, "written text", "speed" or
        "size"), metric, domain (or "all"), n (documents, questions, prompts or rounds), value,
        low, high, difference (value - baseline), its interval, relative (difference /
        baseline), higher_is_better. The baseline comes first.

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
        rows += _written_rows(name, found, base)
        rows += _usage_rows(name, found, base)
    if not rows:
        raise MissingInputError("the evaluations measured nothing; evaluate with a corpus or tasks")
    whole = [dict.fromkeys(SCHEMA) | row for row in rows]
    return pl.DataFrame(whole, schema=SCHEMA, orient="row")


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


def _written_rows(name: str, found: Evaluation, base: Evaluation) -> Iterator[dict[str, Any]]:
    """Repetition in what was written, paired where both went on with the same prompts."""
    mine, theirs = found.repetition, base.repetition
    if mine is None or found.generations is None:
        return
    same = base.generations is not None and found.generations.select("prompt", "text").equals(
        base.generations.select("prompt", "text")
    )
    same = same and _asked_to_write(found) == _asked_to_write(base)
    ones = np.ones(mine.height)
    head = {"model": name, "measure": WRITTEN, "domain": EVERYWHERE, "n": mine.height}
    for metric in ("rep_2", "rep_4", "loop", "stuck", "tokens"):
        reference = _column(theirs, metric) if same and theirs is not None else None
        numbers = _numbers(_column(mine, metric), ones, reference, base.seed)
        better = None if metric == "tokens" else False  # fewer repeat less, and say less
        yield head | {"metric": metric, "higher_is_better": better} | numbers
    before = _distinct(base.generations) if same else None
    numbers = _exact(_distinct(found.generations), before)
    yield head | {"metric": "distinct_2", "higher_is_better": True} | numbers


def _asked_to_write(found: Evaluation) -> object:
    return found.about.get("settings", {}).get("generate")


def _distinct(generations: pl.DataFrame | None) -> float:
    return 0.0 if generations is None else distinct(generations["ids"].to_list(), 2)


def _usage_rows(name: str, found: Evaluation, base: Evaluation) -> Iterator[dict[str, Any]]:
    """Tokens per second, compared where both were measured alike, and sizes."""
    mine, theirs = found.usage, base.usage
    if mine is None:
        return
    head = {"model": name, "domain": EVERYWHERE}
    alike = theirs is not None and _conditions(mine) == _conditions(theirs)
    for metric in ("prefill", "decode"):
        rounds = np.asarray(getattr(mine, metric))
        before = np.asarray(getattr(theirs, metric)) if alike else None
        row = {"measure": SPEED, "metric": f"{metric}, tokens/s", "n": len(rounds)}
        yield head | row | {"higher_is_better": True} | _medians(rounds, before, base.seed)
    for metric in ("parameters", "weight_bytes", "resident_bytes", "disk_bytes"):
        value, reference = getattr(mine, metric), getattr(theirs, metric, None)
        row = {"measure": SIZE, "metric": metric, "n": 1, "higher_is_better": False}
        if value is not None:
            yield head | row | _exact(value, reference)


def _conditions(usage: Usage) -> tuple[object, ...]:
    """What must be alike for speeds to be compared."""
    return usage.batch, usage.prompt_tokens, usage.new_tokens, usage.threads, usage.device


def _exact(value: float, before: float | None) -> dict[str, float | None]:
    """A number without an interval, and how far it is from another."""
    row: dict[str, float | None] = {"value": float(value)}
    if before is None:
        return row
    return row | {
        "difference": float(value - before),
        "relative": (value - before) / before if before else None,
    }


def _medians(
    rounds: NDArray[np.float64], before: NDArray[np.float64] | None, seed: int
) -> dict[str, float | None]:
    """The median of some rounds with its interval, and its difference from that of others."""
    rng = np.random.default_rng(seed)
    low, high = percentiles(np.median(rng.choice(rounds, (RESAMPLES, len(rounds))), axis=1))
    middle = None if before is None else float(np.median(before))
    return _exact(float(np.median(rounds)), middle) | {"low": low, "high": high}


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
