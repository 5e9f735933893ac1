"""Experts that go together, in the order in which they would go."""

from __future__ import annotations

from collections.abc import Sequence
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
        Expert ids; past the units of a layer that has fewer than others, those it does not have.
    values : float64 array of shape (n_layers, n_units)
        Sums of their scores, ascending between `must` and `may`.
    must : int64 array of shape (n_layers,)
        Units that go whatever the budget: those with experts of the drop-list.
    may : int64 array of shape (n_layers,)
        Units that can go: neither protected nor needed by the router.
    size : int64 array of shape (n_layers,)
        Units that each layer has.
    """

    experts: NDArray[np.int64]
    values: NDArray[np.float64]
    must: NDArray[np.int64]
    may: NDArray[np.int64]
    size: NDArray[np.int64]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.experts)

    @property
    def n_units(self) -> int:
        """Units of each layer; the most that one has where layers differ."""
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
    counts: Sequence[int],
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
    counts : sequence of int
        Experts of every layer; what is past them is neither dropped nor kept.
    n_groups : int
        Router groups; divides the experts of every layer.
    least : int
        Units that every layer keeps at least.
    """
    n_experts = values.shape[1]
    layers = zip(values, guarded, doomed, counts, strict=True)
    ranked = [_ranked(*layer, n_groups) for layer in layers]
    size = np.asarray(counts, dtype=np.int64) // n_groups
    experts, summed, must, held = (np.stack(part) for part in zip(*ranked, strict=True))
    return Units(
        experts=experts.reshape(len(values), n_experts // n_groups, n_groups),
        values=summed,
        must=must,
        may=size - np.maximum(held, least),
        size=size,
    )


def _ranked(
    values: NDArray[np.float64],
    guarded: NDArray[np.bool_],
    doomed: NDArray[np.bool_],
    count: int,
    n_groups: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], np.int64, np.int64]:
    """One layer: ids by unit, sums of their scores, how many must go and how many are held."""
    shape = n_groups, count // n_groups
    by_group, held, out = (one[:count].reshape(shape) for one in (values, guarded, doomed))
    identity = np.broadcast_to(-np.arange(shape[1]), shape)
    order = np.lexsort((identity, by_group, held.astype(np.int8) - out), axis=1)
    ids = order + np.arange(n_groups)[:, None] * shape[1]
    n_more = (len(values) - count) // n_groups
    summed = np.take_along_axis(by_group, order, axis=1).sum(axis=0)
    return (
        np.concatenate([ids.T.ravel(), np.arange(count, len(values))]),
        np.concatenate([summed, np.zeros(n_more)]),
        out.sum(axis=1).max(),
        held.sum(axis=1).max(),
    )
