"""Experts that go together, in the order in which they would go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Units:
    """The experts of each layer in units, first to go first.

    A unit is one expert, or one expert of each router group where a router chooses by groups, so
    that whole units leave every group as many. A layer drops its first units and no others, which
    makes any plan a number of units for each layer.

    Parameters
    ----------
    experts : int64 array of shape (n_layers, n_units, n_groups)
        Expert ids.
    values : float64 array of shape (n_layers, n_units)
        Sums of their scores, ascending between `must` and `may`.
    must : int64 array of shape (n_layers,)
        Units that go whatever the budget: those with experts of the drop-list.
    may : int64 array of shape (n_layers,)
        Units that can go: neither protected nor needed by the router.
    """

    experts: NDArray[np.int64]
    values: NDArray[np.float64]
    must: NDArray[np.int64]
    may: NDArray[np.int64]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.experts)

    @property
    def n_units(self) -> int:
        """Units of each layer."""
        return int(self.experts.shape[1])

    @property
    def n_groups(self) -> int:
        """Experts of each unit."""
        return int(self.experts.shape[2])

    def gone(self, n_gone: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which experts go with so many first units: (n_layers, n_experts).

        `n_gone` is an int64 array of shape (n_layers,).
        """
        gone = np.zeros((self.n_layers, self.n_units * self.n_groups), dtype=np.bool_)
        for row, n in enumerate(n_gone):
            gone[row, self.experts[row, :n].ravel()] = True
        return gone


def make_units(
    values: NDArray[np.float64],
    guarded: NDArray[np.bool_],
    doomed: NDArray[np.bool_],
    *,
    n_groups: int,
    least: int,
) -> Units:
    """Units of all layers: doomed experts first, guarded last, else the lowest score first.

    Of equal scores the larger id goes first.

    Parameters
    ----------
    values : float64 array of shape (n_layers, n_experts)
        Scores.
    guarded, doomed : bool arrays of shape (n_layers, n_experts)
        Experts that have to stay, and to go; none is both.
    n_groups : int
        Router groups; divides `n_experts`.
    least : int
        Units that every layer keeps at least.
    """
    shape = len(values), n_groups, values.shape[1] // n_groups
    by_group, held, out = (one.reshape(shape) for one in (values, guarded, doomed))
    identity = np.broadcast_to(-np.arange(shape[2]), shape)
    order = np.lexsort((identity, by_group, held.astype(np.int8) - out), axis=2)
    first = np.arange(n_groups)[:, None] * shape[2]
    ranked = np.take_along_axis(by_group, order, axis=2)
    kept = np.maximum(held.sum(axis=2).max(axis=1), least)
    return Units(
        experts=np.ascontiguousarray((order + first).swapaxes(1, 2), dtype=np.int64),
        values=ranked.sum(axis=1),
        must=out.sum(axis=2).max(axis=1).astype(np.int64),
        may=(shape[2] - kept).astype(np.int64),
    )
