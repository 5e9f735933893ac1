"""How well a block without some experts does what it did with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.criteria.base import Evidence
from moecollab.criteria.pairs import rank_by_fall
from moecollab.criteria.probing.block import Block, without
from moecollab.criteria.probing.probing import check_masks, subject
from moecollab.criteria.probing.reading import blocks_of
from moecollab.progress import Bar, track

SUBSETS = 500
"""Most sets of experts of which every one is tried."""


def squared_errors(evidence: Evidence) -> NDArray[np.float64]:
    """Σ_t ‖y' - y‖² / Σ_t ‖y‖² of each block without each expert: (n_layers, n_experts)."""

    def error(found: Tensor, expected: Tensor) -> Tensor:
        return (found.double() - expected.double()).square().sum(dim=1)

    def size(expected: Tensor) -> float:
        return float(expected.double().square().sum())

    return _single_errors(evidence, error, size)


def cosine_errors(evidence: Evidence) -> NDArray[np.float64]:
    """Mean over tokens of 1 - cos(y', y) without each expert: (n_layers, n_experts)."""

    def error(found: Tensor, expected: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(found.double(), expected.double(), dim=1, eps=1e-30)

    return _single_errors(evidence, error, len)


def _single_errors(
    evidence: Evidence,
    error: Callable[[Tensor, Tensor], Tensor],
    size: Callable[[Tensor], float],
) -> NDArray[np.float64]:
    """Errors summed over tokens and divided by a size, per layer and expert."""
    model, layers, windows = subject(evidence)
    check_masks(layers, [1] * len(layers))
    found = np.zeros(evidence.shape)
    with track("leaving one out", sum(layer.n_experts for layer in layers)) as bar:
        for row, block in enumerate(blocks_of(model, layers, windows)):
            total = size(block.output)
            for expert in range(block.layer.n_experts):
                tokens = block.concerned((expert,))
                output, _ = block.run(without(block.layer, (expert,)), tokens)
                wrong = float(error(output, block.output[tokens]).sum())
                found[row, expert] = wrong / total if total > 0 else 0.0
                bar.advance()
    return found


def subset_ranks(evidence: Evidence) -> NDArray[np.float64]:
    """Ranks of falling, those of the best set to drop first: (n_layers, n_experts)."""
    model, layers, windows = subject(evidence)
    searches = [_Search.of(layer.n_experts, evidence.drop) for layer in layers]
    check_masks(layers, [max(1, one.n_drop) for one in searches])
    with track("trying sets", sum(one.steps for one in searches)) as bar:
        blocks = zip(blocks_of(model, layers, windows), searches, strict=True)
        gone = [one.run(block, one.n_drop, bar) for block, one in blocks]
    return evidence.stacked(rank_by_fall(order, len(order)) for order in gone)


@dataclass(frozen=True)
class _Search:
    """How the set that one layer drops is looked for."""

    run: Callable[[Block, int, Bar], list[int]]
    n_drop: int
    steps: int
    """Blocks that an exact search runs, or experts that a greedy one drops."""

    @classmethod
    def of(cls, n_experts: int, drop: float) -> _Search:
        """The exact search where there are few sets, else the greedy one."""
        n_drop = math.floor(drop * n_experts + 0.5)
        sets = math.comb(n_experts, n_drop)
        if sets > SUBSETS:
            return cls(greedy, n_drop, n_drop)
        return cls(every_set, n_drop, sets + n_experts)


def every_set(block: Block, n_drop: int, bar: Bar) -> list[int]:
    """All experts in the order in which they fall, by the best of all sets of `n_drop`.

    Inside the set, and after it, an expert whose loss alone costs less falls first.
    """

    def costs(dropped: Sequence[int]) -> float:
        bar.advance()
        return _distance(block, _changes(block, dropped)[0])

    experts = range(block.layer.n_experts)
    # Of equals the larger ids fall.
    best = min(combinations(reversed(experts), n_drop), key=costs) if n_drop else ()
    alone = [costs((expert,)) for expert in experts]
    return sorted(experts, key=lambda one: (one not in best, alone[one], -one))


def greedy(block: Block, n_drop: int, bar: Bar) -> list[int]:
    """All experts in the order in which they fall, each time that which costs least.

    Those that are left after `n_drop` follow by what each would have cost at the last step.
    """
    gone: list[int] = []
    left = list(range(block.layer.n_experts))[::-1]  # of equals the larger ids fall
    squares = torch.zeros(len(block.ids), dtype=torch.float64, device=block.ids.device)
    ids, costs = block.ids, dict.fromkeys(left, 0.0)
    for _ in range(max(1, n_drop)):
        tried = {}
        for expert in left:
            tried[expert] = _changes(block, (*gone, expert), squares, ids)
            costs[expert] = _distance(block, tried[expert][0])
        if len(gone) == n_drop:
            break
        least = min(left, key=lambda one: costs[one])
        squares, ids = tried[least]
        gone.append(least)
        left.remove(least)
        bar.advance()
    return [*gone, *sorted(left, key=lambda one: costs[one])]


def _changes(
    block: Block,
    dropped: Sequence[int],
    squares: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """‖y' - y‖² of every token without some experts, and what tokens choose then.

    `squares` and `ids` are these without all of `dropped` but the last, where that is known; only
    tokens that chose the last run then.
    """
    new = dropped if squares is None else dropped[-1:]
    squares = torch.zeros(len(block.ids), dtype=torch.float64) if squares is None else squares
    squares, ids = squares.clone(), (block.ids if ids is None else ids).clone()
    tokens = block.concerned(new, ids)
    output, ids[tokens] = block.run(without(block.layer, dropped), tokens)
    off = output.double() - block.output[tokens].double()
    squares[tokens.to(squares.device)] = off.square().sum(dim=1).to(squares.device)
    return squares, ids


def _distance(block: Block, squares: Tensor) -> float:
    """Σ over windows of ‖Y' - Y‖_F."""
    sums = np.add.reduceat(squares.cpu().numpy(), block.starts[:-1])
    return float(np.sqrt(sums).sum())
