"""One tensor of the smaller checkpoint, as runs of bytes of one tensor of the old."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moecollab.models.headers import Stored


@dataclass(frozen=True)
class Piece:
    """What is written of one tensor on disk.

    Parameters
    ----------
    name : str
        In the smaller checkpoint.
    stored : Stored
        Where its bytes are.
    shape : tuple of int
        Of what is written.
    runs : tuple of (int, int)
        First byte within the tensor, and number of bytes, one run after the other.
    """

    name: str
    stored: Stored
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def n_bytes(self) -> int:
        """Size of what is written."""
        return sum(count for _, count in self.runs)


def whole(name: str, stored: Stored) -> Piece:
    """All of a tensor."""
    return Piece(name, stored, stored.shape, _joined([(0, stored.n_bytes)]))


def cut(name: str, stored: Stored, dimension: int, units: int, kept: Sequence[int]) -> Piece:
    """Some of the equal units that a tensor has along a dimension, in the order given."""
    before, here, after = (
        stored.shape[:dimension],
        stored.shape[dimension] // units,
        stored.shape[dimension + 1 :],
    )
    size = stored.n_bytes // max(1, prod(before) * units)
    runs = [((outer * units + unit) * size, size) for outer in range(prod(before)) for unit in kept]
    return Piece(name, stored, (*before, here * len(kept), *after), _joined(runs))


def _joined(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same bytes in as few runs as can be."""
    found: list[tuple[int, int]] = []
    for start, count in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        elif count:
            found.append((start, count))
    return tuple(found)
