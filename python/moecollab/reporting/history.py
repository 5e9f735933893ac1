"""How the fit went: the objective and its terms over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

TERMS = {
    "total": ("objective", None),
    "reconstruction": ("what the groups leave unexplained", "reconstruction"),
    "sparsity": ("how many groups a token needs", "sparsity"),
    "dictionary_size": ("how many groups there are", None),
}
"""Column of the history: what it is called on the page, and the setting that weighs it."""
FINAL = "final"
"""Stage of the last row, which is the result and no round."""


@dataclass(frozen=True)
class Curve:
    """One weighted term of the objective: a value per round, None between stages."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class FitHistory:
    """The objective and its terms by round, and the rounds at which a stage begins."""

    rounds: tuple[int | None, ...]
    curves: tuple[Curve, ...]
    stages: tuple[tuple[int, str], ...]


def fit_history(
    history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> FitHistory | None:
    """The terms as they count in the objective; None without rounds.

    A stage has its own objective, so lines are broken where a new one begins.
    """
    rows = [row for row in history if row["stage"] != FINAL]
    if not rows:
        return None
    begins = {place for place, pair in enumerate(pairwise(rows), 1) if _changes(*pair)}
    rounds: list[int | None] = []
    for place in range(len(rows)):
        rounds += [None, place + 1] if place in begins else [place + 1]
    curves = tuple(
        Curve(
            name,
            tuple(
                None if at is None else _weight(setting, settings) * float(rows[at - 1][column])
                for at in rounds
            ),
        )
        for column, (name, setting) in TERMS.items()
    )
    stages = tuple((place + 1, str(rows[place]["stage"])) for place in sorted({0, *begins}))
    return FitHistory(tuple(rounds), curves, stages)


def _changes(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    return bool(earlier["stage"] != later["stage"])


def _weight(setting: str | None, settings: Mapping[str, Any]) -> float:
    """What a term is multiplied by in the objective."""
    return 1.0 if setting is None else float(settings.get(setting, 1.0))
