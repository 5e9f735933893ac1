"""Budgets: how much may stay, said in one of several ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from moecollab.errors import SHARE, SettingsError

Per: TypeAlias = Literal["layer", "model", "entropy", "similarity"]
AMOUNTS = ("drop", "experts", "mass", "memory_gb")
"""Ways to say how much; a budget has one of them, or none where a drop-list says it."""

_NUMBERS: dict[str, tuple[type[Any], Callable[[Any], bool], str]] = {
    "drop": (Real, lambda share: 0 <= share < 1, SHARE),
    "experts": (Integral, lambda n: n >= 1, "a whole number, 1 or more"),
    "mass": (Real, lambda share: 0 < share <= 1, "a share in (0, 1], such as 0.9"),
    "memory_gb": (Real, lambda size: 0 < size < math.inf, "above 0 and finite"),
    "floor": (Integral, lambda n: n >= 0, "a whole number, 0 or more"),
}
"""Kind and range of each number, and both in words."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many experts may stay, and how the layers share them.

    Parameters
    ----------
    drop : float, optional
        Fraction of the experts to drop, in [0, 1).
    experts : int, optional
        Experts to keep, ≥ 1: in each layer with ``per="layer"``, else in the model.
    mass : float, optional
        Share of the scores that must stay, in (0, 1]: the smallest set of experts that has it.
    memory_gb : float, optional
        Most gigabytes (10⁹ bytes) of the checkpoint that is left, > 0.
    per : {"layer", "model", "entropy", "similarity"}
        How layers share the budget; see :func:`moecollab.plan`.
    floor : int
        Experts that every layer keeps at least, ≥ 0; never fewer than the router selects.
    """

    drop: float | None = None
    experts: int | None = None
    mass: float | None = None
    memory_gb: float | None = None
    per: Per = "layer"
    floor: int = 0

    def __post_init__(self) -> None:
        """Checks ranges, and that the amount is said in one way."""
        for name in AMOUNTS:
            if getattr(self, name) is not None:
                self._read(name)
        self._read("floor")
        if self.per not in get_args(Per):
            raise SettingsError("per", self.per, " or ".join(map(repr, get_args(Per))))
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingsError("budget", given, f"one of {', '.join(AMOUNTS)}, not several")

    def _read(self, name: str) -> None:
        """Checks a number and makes it one of Python's, which JSON can hold."""
        kind, inside, allowed = _NUMBERS[name]
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not inside(value):
            raise SettingsError(name, value, allowed)
        object.__setattr__(self, name, int(value) if kind is Integral else float(value))

    def check_scores_suffice(self, where: str) -> None:
        """Raises SettingsError if layers share by similarities, which nothing but plan takes."""
        if self.per == "similarity":
            raise SettingsError("per", self.per, f"'layer', 'model' or 'entropy' {where}")

    @property
    def amount(self) -> str:
        """Which of the amounts is given; empty where none is."""
        return next((name for name in AMOUNTS if getattr(self, name) is not None), "")

    def as_json(self) -> dict[str, Any]:
        """What was asked for, as plain data; what is left out has its default."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if getattr(self, one.name) != one.default
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Budget:
        """The budget in plain data."""
        return cls(**value)
