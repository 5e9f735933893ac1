"""Passes over all rows until one gains less than the tolerance; the best is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from moecollab.patterns.steps import (
    Arrays,
    Levels,
    Steps,
    full_scale,
    pull_of,
    step_finer,
    terms,
    total,
)

Kept = TypeVar("Kept")
"""Whatever holds the codes of a pass."""


@dataclass(frozen=True)
class Pass(Generic[Kept]):
    """One pass: the levels as they were used, what all rows came to, codes, a line of history."""

    levels: Levels
    sums: Arrays
    codes: Kept
    row: dict[str, Any]

    @property
    def objective(self) -> float:
        """The weighted total over all rows."""
        return float(self.row["total"])


@dataclass
class Descent(Generic[Kept]):
    """Passes of one stage; ``rows`` is the history of those that gained.

    ``measure(levels, number)`` codes all rows on the atoms of level 1 and returns what they come
    to, usage and peak among it, with whatever holds the codes.
    """

    steps: Steps
    measure: Callable[[Levels, int], tuple[Arrays, Kept]]
    stage: str
    watch: Callable[[dict[str, Any]], object] = lambda _: None
    best: Pass[Kept] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, levels: Levels, limit: int) -> str:
        """Goes on until a pass gains less than the tolerance; returns why it ended."""
        for number in range(1, limit + 1):
            last = self.best
            now = self.look(levels if last is None else self._next(last), number)
            if last is not None and now.objective >= last.objective:
                return "tolerance"
            self.best = now
            self.rows.append(now.row)
            self.watch(now.row)
            least = self.steps.settings["tolerance"] * (last.objective if last else 0.0)
            if last is not None and last.objective - now.objective <= least:
                return "tolerance"
        return "max iterations"

    def look(self, levels: Levels, number: int) -> Pass[Kept]:
        """One pass over all rows."""
        sums, codes = self.measure(levels, number)
        first = replace(levels.stages[0], caps=sums["peak"])
        seen = Levels((first, *levels.stages[1:]), sums["usage"] / sums["rows"])
        return Pass(seen, sums, codes, self._row(seen, sums, number))

    def _row(self, levels: Levels, sums: Arrays, number: int) -> dict[str, Any]:
        """The line of the history."""
        size, sparsity, error = terms(levels, float(sums["cost"][0]), self.steps)
        return {
            "stage": self.stage,
            "iteration": number,
            "dictionary_size": size,
            "sparsity": sparsity,
            "reconstruction": error,
            "total": total(self.steps.settings, (size, sparsity, error)),
            "live": int(sum((stage.caps > 0).sum() for stage in levels.stages)),
        }

    def _next(self, now: Pass[Kept]) -> Levels:
        """Atoms one step further on."""
        first = now.levels.stages[0]
        atoms = self.steps.move(first, now.sums, pull_of(now.levels))
        scaled, factor = full_scale(replace(first, atoms=atoms), self.steps)
        moved = Levels((scaled, *now.levels.stages[1:]), now.levels.use * factor)
        return step_finer(moved, self.steps)


def graver(*reasons: str) -> str:
    """The most serious of some stop reasons."""
    return max(reasons, key=("tolerance", "max iterations", "nothing to fit", "interrupted").index)
