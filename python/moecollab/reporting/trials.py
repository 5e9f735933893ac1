"""What models write and what running them takes, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from moecollab.evaluation.differences import WRITTEN, differences
from moecollab.evaluation.evaluation import Evaluation
from moecollab.evaluation.usage import Usage
from moecollab.reporting.costs import baseline_name

MOST_SAMPLES = 6
"""Beginnings that are shown."""
MOST_MODELS = 4
"""Models whose words stand side by side; more cannot be read."""


@dataclass(frozen=True)
class Repetition:
    """How much one model repeats itself, by metric, beside the full model."""

    name: str
    prompts: int
    metrics: Mapping[str, Mapping[str, float | None]]

    def value(self, metric: str) -> float:
        """The metric itself."""
        return self.part(metric, "value") or 0.0

    def part(self, metric: str, column: str) -> float | None:
        """A column of :func:`differences`."""
        return self.metrics[metric][column]


@dataclass(frozen=True)
class Sample:
    """One beginning, and what each shown model wrote after it."""

    text: str
    written: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What was written and how fast, where it was measured.

    Parameters
    ----------
    baseline : str
        Name of the full model.
    written : tuple of Repetition
        One per model that wrote something, the full one first.
    shown : tuple of str
        Models whose words are shown.
    samples : tuple of Sample
        Their words after the same beginnings.
    usage : mapping of name to Usage
        Speed and size.
    """

    baseline: str
    written: tuple[Repetition, ...]
    shown: tuple[str, ...]
    samples: tuple[Sample, ...]
    usage: Mapping[str, Usage]

    @property
    def conditions(self) -> tuple[str, ...]:
        """How the speeds were measured, in a sentence for each way."""
        found = (
            f"Median of {len(one.decode)} rounds after a warm-up: {one.batch} sequence of "
            f"{one.prompt_tokens} drawn tokens, then {one.new_tokens} written; {one.device}, "
            f"{one.threads} thread{'s' if one.threads > 1 else ''}."
            for one in self.usage.values()
        )
        return tuple(dict.fromkeys(found))


def trials_of(evaluations: Mapping[str, Evaluation]) -> Trials | None:
    """What was written and how fast; None without a full model or either of these."""
    baseline = baseline_name(evaluations)
    some = any(one.generations is not None or one.usage for one in evaluations.values())
    if baseline is None or not some:
        return None
    order = [baseline, *(name for name in evaluations if name != baseline)]
    shown, samples = _samples({name: evaluations[name].generations for name in order})
    usage = {name: evaluations[name].usage for name in order}
    return Trials(
        baseline=baseline,
        written=_written(evaluations, baseline),
        shown=shown,
        samples=samples,
        usage={name: one for name, one in usage.items() if one is not None},
    )


def _written(evaluations: Mapping[str, Evaluation], baseline: str) -> tuple[Repetition, ...]:
    """Repetition of each model, from the table of differences."""
    table = differences(evaluations, baseline=baseline).filter(measure=WRITTEN)
    return tuple(
        Repetition(
            str(part["model"][0]),
            int(part["n"][0]),
            {row["metric"]: row for row in part.iter_rows(named=True)},
        )
        for part in table.partition_by("model", maintain_order=True)
    )


def _samples(
    tables: Mapping[str, pl.DataFrame | None],
) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """Models that went on with the same beginnings as the first, and their words."""
    first = next((table for table in tables.values() if table is not None), None)
    if first is None:
        return (), ()
    same = {
        name: table
        for name, table in tables.items()
        if table is not None and table["text"].equals(first["text"])
    }
    shown = tuple(same)[:MOST_MODELS]
    texts = first["text"].head(MOST_SAMPLES).to_list()
    return shown, tuple(
        Sample(text, tuple(same[name]["written"][row] for name in shown))
        for row, text in enumerate(texts)
    )
