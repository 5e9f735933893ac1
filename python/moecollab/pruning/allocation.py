"""How many experts each layer gives up under a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores
from moecollab.errors import DataError, PlanError, SettingsError, ShapeError
from moecollab.pruning.budgets import Budget
from moecollab.pruning.sequences import by_entropy, by_score, by_similarity
from moecollab.pruning.units import Units

if TYPE_CHECKING:
    from moecollab.models.footprint import Footprint

GB = 1e9
"""Bytes of a gigabyte."""

_EXACT = 1 - 1e-12
"""A share that misses another by rounding alone reaches it."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A budget and all that decides how many units of each layer go under it.

    Parameters
    ----------
    budget : Budget
        What was asked for.
    scores : Scores
        One score per expert.
    units : Units
        What can go, and what has to.
    footprint : Footprint, optional
        Bytes of the experts, for a budget in gigabytes.
    similarity : float64 array of shape (n_layers, n_experts, n_experts), optional
        For ``per="similarity"``.
    """

    budget: Budget
    scores: Scores
    units: Units
    footprint: Footprint | None = None
    similarity: NDArray[np.float64] | None = None

    def n_gone(self) -> NDArray[np.int64]:
        """Units that each layer gives up: int64 array of shape (n_layers,).

        Raises
        ------
        PlanError
            When the budget cannot be met.
        """
        self._check_lists()
        if not self.budget.amount:
            return self.units.must
        if self.budget.per != "layer":
            return self._of_sequence(self._sequence())
        if self.budget.amount == "mass":
            return self._by_share()
        if self.budget.amount == "memory_gb":
            return self._by_size()
        n = self._n_rounds()
        room = self.units.may - n
        if room.min() < 0:
            row = int(room.argmin())
            raise self._too_many(int(n[row]), row)
        short = self.units.must - n
        if short.max() > 0:
            row = int(short.argmax())
            raise self._too_long(row, int(n[row]))
        return n

    def _check_lists(self) -> None:
        over = np.flatnonzero(self.units.must > self.units.may)
        if len(over):
            row, size = int(over[0]), self.units.n_groups
            raise PlanError(
                f"layer {self.scores.layers[row]} must drop {self.units.must[row] * size} experts "
                f"but can do without {max(0, self.units.may[row]) * size} only{self._why(row)}; "
                "shorten the drop-list"
            )

    # How far to go: in every layer alike, by shares of each layer, or along a sequence of layers.

    def _n_rounds(self) -> NDArray[np.int64]:
        """Units that go from every layer: of equal layers as many, of others the same share."""
        budget, units = self.budget, self.units
        if budget.experts is not None:
            gone = [self._n_dropped(budget.experts, n) for n in self.scores.counts_of_experts]
            return np.array(gone, dtype=np.int64) // units.n_groups
        share = budget.drop or 0.0
        return np.array([_rounded(share, int(n)) for n in units.size], dtype=np.int64)

    def _by_size(self) -> NDArray[np.int64]:
        """Units that each layer gives up to fit: the same share, or what the drop-list takes of it.

        Memory is a limit and no aim: no layer drops more because the list takes more of another.
        """
        each = _by_growing_shares(self.units.size)
        n_gone = np.maximum(each[(each <= self.units.may).all(axis=1)], self.units.must)
        freed = n_gone @ np.asarray(self._bytes().expert) * self.units.n_groups
        found: NDArray[np.int64] = n_gone[self._first_that_fits(freed)]
        return found

    def _by_share(self) -> NDArray[np.int64]:
        """Units that each layer can give up and still hold its share of the scores."""
        kept = [_least_kept(values, self._mass()) for values in self._shares()]
        n_gone = np.minimum(self.units.n_units - np.array(kept), self.units.may)
        short = np.flatnonzero(n_gone < self.units.must)
        if len(short):
            raise self._too_long(int(short[0]), int(n_gone[short[0]]))
        return np.asarray(n_gone, dtype=np.int64)

    def _sequence(self) -> NDArray[np.int64]:
        """The order in which layers give up units."""
        if self.budget.per == "model":
            return by_score(self.units)
        if self.budget.per == "entropy":
            self._shares()
            return by_entropy(self.units, self.scores.values, self.scores.present)
        return by_similarity(self.units, self._similarity())

    def _of_sequence(self, sequence: NDArray[np.int64]) -> NDArray[np.int64]:
        """Units that each layer gives up along a sequence of layers."""
        n = self._n_steps(sequence)
        if n > len(sequence):
            raise self._too_many(n, None)
        if n < self.units.must.sum():
            raise self._too_long(None, n)
        return np.bincount(sequence[:n], minlength=self.units.n_layers).astype(np.int64)

    def _n_steps(self, sequence: NDArray[np.int64]) -> int:
        """Steps of a sequence that the budget asks for."""
        budget, units = self.budget, self.units
        if budget.drop is not None:
            return _rounded(budget.drop, int(units.size.sum()))
        if budget.experts is not None:
            return self._n_dropped(budget.experts, self.scores.n_sites) // units.n_groups
        if budget.mass is not None:
            values = self._shares()
            along = values[sequence, _occurrences(sequence)]
            fixed = values.sum() - along.sum()
            return len(sequence) - _least_kept(along, self._mass(), fixed)
        sizes = np.asarray(self._bytes().expert)[sequence] * units.n_groups
        freed = np.concatenate(([0.0], np.cumsum(sizes)))
        return max(self._first_that_fits(freed), int(units.must.sum()))

    def _n_dropped(self, experts: int, n: int) -> int:
        """Experts to drop of `n`, so that so many stay."""
        if experts > n:
            raise SettingsError("experts", experts, f"at most the {n} that there are")
        if experts % self.units.n_groups:
            raise SettingsError(
                "experts", experts, f"a multiple of the {self.units.n_groups} router groups"
            )
        return n - experts

    def _first_that_fits(self, freed: NDArray[np.float64]) -> int:
        """The first of some ascending numbers of bytes after which what is left fits."""
        footprint = self._bytes()
        layers = zip(footprint.expert, self.scores.counts_of_experts, strict=True)
        total = footprint.rest + sum(expert * count for expert, count in layers)
        n = int(np.searchsorted(freed, total - (self.budget.memory_gb or 0.0) * GB))
        if n == len(freed):
            least = total - freed[-1]
            raise PlanError(
                f"the smallest checkpoint that can be left with per={self.budget.per!r} has "
                f"{least / GB:.4g} GB; raise memory_gb from {self.budget.memory_gb:g} to "
                f"{math.ceil(least / GB * 1e4) / 1e4:g} or more"
            )
        return n

    # What else the budget needs.

    def _bytes(self) -> Footprint:
        if self.footprint is None:
            raise SettingsError(
                "model", None, "given for memory_gb (--model), the whole model or its Footprint"
            )
        if len(self.footprint.expert) != self.units.n_layers:
            raise ShapeError(
                f"the model has {len(self.footprint.expert)} MoE layers, but the scores are of "
                f"{self.units.n_layers}; give the model that was scored"
            )
        return self.footprint

    def _mass(self) -> float:
        return 1.0 if self.budget.mass is None else self.budget.mass

    def _shares(self) -> NDArray[np.float64]:
        """Scores of the units, none negative; those of a layer of zeros are all equal."""
        lowest = np.unravel_index(self.scores.values.argmin(), self.scores.values.shape)
        if self.scores.values[lowest] < 0:
            what = "mass" if self.budget.amount == "mass" else "per='entropy'"
            raise DataError(
                f"{what} needs shares of scores that are not negative, but the "
                f"{self.scores.criterion} score of layer {self.scores.layers[lowest[0]]} expert "
                f"{lowest[1]} is {self.scores.values[lowest]:g}; use drop or experts, or another "
                "criterion"
            )
        if self.budget.per == "layer":
            empty = ~self.scores.values.any(axis=1, keepdims=True)
        else:
            empty = np.asarray(not self.scores.values.any())
        there = np.arange(self.units.n_units) < self.units.size[:, None]
        return np.where(empty & there, 1.0, self.units.values)

    def _similarity(self) -> NDArray[np.float64]:
        wanted = (*self.scores.values.shape, self.scores.n_experts)
        if self.similarity is None:
            raise SettingsError("similarity", None, f"an array {wanted} for per='similarity'")
        found = np.asarray(self.similarity, dtype=np.float64)
        if found.shape != wanted or not np.isfinite(found).all():
            raise ShapeError(
                f"similarity has shape {found.shape} or is not finite, expected {wanted}; give one "
                "square matrix per layer"
            )
        if not np.allclose(found, found.swapaxes(1, 2)):
            raise DataError("similarity is not symmetric; give (s + s.T) / 2 for each layer")
        return found

    # What cannot be.

    def _too_many(self, n: int, row: int | None) -> PlanError:
        """The error for more units than can go: in a layer, or in the model."""
        size, top_k = self.units.n_groups, self.scores.top_k
        if row is not None:
            n_units, room = int(self.units.size[row]), int(self.units.may[row])
            kept = (n_units - n) * size
            why = self._why(row).removeprefix(", as ")
            return PlanError(
                f"layer {self.scores.layers[row]} would keep {kept} experts but {why}; "
                f"{self._advice(room, n_units)}"
            )
        room = int(self.units.may.sum())
        return PlanError(
            f"{n * size} of {self.scores.n_sites} experts would go but only {room * size} can, as "
            f"every layer keeps what is protected and what its router needs (top_k={top_k}); "
            f"{self._advice(room, int(self.units.size.sum()))}"
        )

    def _why(self, row: int) -> str:
        """Why a layer cannot do without more."""
        least = int(self.units.size[row] - self.units.may[row]) * self.units.n_groups
        if least <= self.scores.top_k:
            return f", as the router selects top_k={self.scores.top_k}"
        if least <= self.budget.floor:
            return f", as the floor is {self.budget.floor}"
        return f", as {least} are protected or needed by the router"

    def _too_long(self, row: int | None, n: int) -> PlanError:
        """The error for a drop-list that takes more than the budget."""
        size, must = self.units.n_groups, self.units.must
        where = "the model" if row is None else f"layer {self.scores.layers[row]}"
        listed = int(must.sum() if row is None else must[row]) * size
        return PlanError(
            f"{where} would drop {n * size} experts but the drop-list takes {listed}; shorten it "
            "or allow more to go"
        )

    def _advice(self, room: int, n_units: int) -> str:
        """What to ask for instead, where `room` of `n_units` can go."""
        if self.budget.experts is not None:
            return f"raise experts to {(n_units - room) * self.units.n_groups} or more"
        return f"lower drop to {_fraction(max(0, room), n_units):g} or less"


def _least_kept(values: NDArray[np.float64], share: float, fixed: float = 0.0) -> int:
    """How many of the last values hold a share of all, together with what is fixed."""
    held = fixed + np.concatenate(([0.0], np.cumsum(values[::-1])))
    return int(np.argmax(held >= share * held[-1] * _EXACT))


def _occurrences(sequence: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry occurred before."""
    order = np.argsort(sequence, kind="stable")
    ranked = sequence[order]
    found = np.empty_like(sequence)
    found[order] = np.arange(len(sequence)) - np.searchsorted(ranked, ranked)
    return found


def _by_growing_shares(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """What growing shares take of layers of these sizes, rounded: (n_shares, n_layers)."""
    turns = [(2 * np.arange(1, n + 1) - 1) / (2 * n) for n in size]  # where one more goes
    shares = np.unique(np.concatenate([[0.0], *turns]))
    return np.stack([np.searchsorted(turn, shares, side="right") for turn in turns], axis=1)


def _rounded(drop: float, n: int) -> int:
    return math.floor(drop * n + 0.5)


def _fraction(n_drop: int, n: int) -> float:
    """A drop with four digits that surely takes no more than `n_drop` of `n`."""
    return max(0, math.floor(n_drop / n * 10_000)) / 10_000
