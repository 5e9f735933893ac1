"""In which order layers give up experts, where they share a budget of the whole model."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moecollab.pruning.units import Units

GAMMA = 0.05
"""How far the entropy of the layers' shares may fall, as a part of it, before a layer rests."""


def by_score(units: Units) -> NDArray[np.int64]:
    """Layers in the order in which their next unit is the lowest of the model.

    Of equal scores that of the later layer goes first.

    Returns
    -------
    int64 array of shape (n,)
        Rows of `units`: each time one occurs, its next unit goes. Units that must go come first,
        those that cannot go are left out. The same holds of the other sequences.
    """
    n_layers, n_units = units.values.shape
    rows, places = (one.ravel() for one in np.indices((n_layers, n_units)))
    later = (places >= units.must[rows]).astype(np.int8) + (places >= units.may[rows])
    order = np.lexsort((places, -rows, units.values.ravel(), later))
    return rows[order][: int(units.may.sum())].astype(np.int64)


def by_entropy(
    units: Units, scores: NDArray[np.float64], present: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Layers in the order that keeps their sizes in proportion to the spread of their scores.

    The spread of a layer is exp(H) of the shares that its experts have of its scores: how many
    experts of equal score would be as uneven. The layer with most experts for its spread gives up
    the next (largest (kept - 1/2) / exp(H), a divisor method), so that a smaller budget keeps some
    of what a larger one does. Of equals the later layer goes first.

    Parameters
    ----------
    units : Units
        What can go.
    scores : float64 array of shape (n_layers, n_experts)
        Scores, ≥ 0.
    present : bool array of shape (n_layers, n_experts)
        Which of them are of experts.
    """
    layers = zip(scores, present, strict=True)
    spread = np.exp([float(entropies(row[held][None])[0]) for row, held in layers])
    n_gone = units.must.copy()
    left = units.size - n_gone
    queue = [(-(n - 0.5) / spread[row], -row) for row, n in enumerate(left)]
    heapq.heapify(queue)
    rows: list[int] = np.repeat(np.arange(units.n_layers), units.must).tolist()
    while queue:
        _, negative = heapq.heappop(queue)
        row = -negative
        if n_gone[row] >= units.may[row]:
            continue
        rows.append(row)
        n_gone[row] += 1
        heapq.heappush(queue, (-(units.size[row] - n_gone[row] - 0.5) / spread[row], -row))
    return np.asarray(rows, dtype=np.int64)


def entropies(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy in nats of each row's shares; a row of zeros counts as even.

    Examples
    --------
    >>> entropies(np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]])).round(4).tolist()
    [0.6931, 0.0, 0.6931]
    """
    total = scores.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / scores.shape[1])
    logs = np.log(np.where(shares > 0, shares, 1))
    entropy: NDArray[np.float64] = np.maximum(-(shares * logs).sum(axis=1), 0.0)
    return entropy


def by_similarity(
    units: Units, similarity: NDArray[np.float64], *, gamma: float = GAMMA
) -> NDArray[np.int64]:
    """Layers in the order in which GRAPE merges their experts.

    The layer whose experts are most alike in sum merges its most similar pair; it rests once the
    entropy of the layers' shares of what is left has fallen below (1 - gamma) of the start, and all
    wake when all rest. Of equals the later layer and the pair with smaller ids come first.

    Source: GRAPE, arXiv:2604.06542, from a summary of its rule. Differs: a merged pair is stood for
    by its smaller id, and what is dropped of a layer in the end are its lowest scores, not the
    merged, so only how many each layer gives up is GRAPE's.

    Parameters
    ----------
    units : Units
        What can go; a unit of several router groups is as many merges.
    similarity : float64 array of shape (n_layers, n_experts, n_experts)
        How alike the experts of each layer are, symmetric; the diagonal is not read.
    gamma : float
        Share of the entropy that may be lost before a layer rests, in [0, 1).
    """
    counts = units.size * units.n_groups
    merges = [_Merges(one[:n, :n]) for one, n in zip(similarity, counts, strict=True)]
    n_gone = units.must.copy()
    for row, n in enumerate(n_gone):
        merges[row].merge(int(n) * units.n_groups)
    start = _evenness(units.size - n_gone)
    rows: list[int] = np.repeat(np.arange(units.n_layers), units.must).tolist()
    resting: set[int] = set()
    while movable := [row for row in range(units.n_layers) if n_gone[row] < units.may[row]]:
        awake = [row for row in movable if row not in resting]
        if not awake:
            resting.clear()
            continue
        row = max(awake, key=lambda row: (merges[row].summed, row))
        merges[row].merge(units.n_groups)
        n_gone[row] += 1
        rows.append(row)
        if _evenness(units.size - n_gone) < (1 - gamma) * start:
            resting.add(row)
    return np.asarray(rows, dtype=np.int64)


def _evenness(n_kept: NDArray[np.int64]) -> float:
    """Entropy of the layers' shares of what is left."""
    return float(entropies(n_kept[None].astype(np.float64))[0])


class _Merges:
    """The clusters of one layer, merged pair by pair, the most similar first."""

    def __init__(self, similarity: NDArray[np.float64]) -> None:
        self._similarity = similarity
        self._left = np.ones(len(similarity), dtype=np.bool_)
        self._pairs = self._ranked()
        self.summed = float(similarity[np.triu_indices(len(similarity), 1)].sum())

    def merge(self, n: int) -> None:
        """Merges `n` pairs, or as many as there are."""
        for _ in range(n):
            pair = next(self._pairs, None)
            if pair is None:
                return
            self._left[pair[1]] = False
            self.summed -= float(self._similarity[pair[1], self._left].sum())

    def _ranked(self) -> Iterator[tuple[int, int]]:
        """Pairs of which both are left, the most similar first, of equals the smaller ids."""
        first, second = np.triu_indices(len(self._similarity), 1)
        order = np.argsort(-self._similarity[first, second], kind="stable")
        for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if self._left[one] and self._left[other]:
                yield one, other
