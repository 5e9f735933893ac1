"""Where the neurons of a layer's experts are, and bringing one expert's into another's order.

An expert computes the same whatever the order of its intermediate neurons, so two experts must be
brought into one order before their weights are averaged. Families store neurons along either axis,
gate and up projections one after the other or interleaved. Which it is, is tried: under the right
reading a reordered expert computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import undo
from moecollab.models.stacks import expert_stacks, replace_stacks

Fold = Literal["one", "halves", "pairs"]
_CLOSE = 0.02  # of the outputs' norm; other readings are off by about the norm itself

Stacks = Mapping[str, Tensor]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Place:
    """Where the neurons are in one tensor of an expert.

    Parameters
    ----------
    axis : int
        Of the expert's own tensor.
    fold : {"one", "halves", "pairs"}
        Whether a neuron has one entry, or two: half the axis apart, or next to each other.
    """

    axis: int
    fold: Fold


@dataclass(frozen=True)
class Neurons:
    """The neurons of the experts of a layer.

    Parameters
    ----------
    size : int
        Neurons of an expert.
    places : mapping of str to Place or None
        By tensor; None where a tensor has none, as a bias of the outputs.
    """

    size: int
    places: Mapping[str, Place | None]

    def ordered(self, name: str, tensor: Tensor, order: Tensor) -> Tensor:
        """One tensor of an expert with its neurons in another order."""
        place = self.places[name]
        if place is None:
            return tensor
        return tensor.index_select(place.axis, _entries(place.fold, order, self.size))

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor of an expert holds of each neuron: (size, n, …)."""
        place = self.places[name]
        if place is None:
            return tensor.new_zeros(self.size, 0)
        turned = tensor.movedim(place.axis, 0)
        shape = (2, self.size) if place.fold == "halves" else (self.size, -1)
        parts = turned.reshape(*shape, *turned.shape[1:])
        return parts.movedim(0, 1) if place.fold == "halves" else parts


def _entries(fold: Fold, order: Tensor, size: int) -> Tensor:
    if fold == "one":
        return order
    if fold == "halves":
        return torch.cat([order, order + size])
    return torch.stack([2 * order, 2 * order + 1], dim=1).reshape(-1)


def find_neurons(layer: MoeLayer, run: Run) -> Neurons:
    """The neurons of a layer's experts, found by reordering them and running all experts.

    Parameters
    ----------
    layer : MoeLayer
        The layer; left as it was.
    run : callable
        Outputs of all experts on a few tokens.

    Raises
    ------
    UnsupportedModelError
        When no reading leaves the outputs as they were.
    """
    stacks = expert_stacks(layer)
    before = run().double()
    for neurons in _readings({name: tuple(value.shape[1:]) for name, value in stacks.items()}):
        changes = replace_stacks(layer, _shuffled(stacks, neurons))
        try:
            off = (run().double() - before).norm()
        finally:
            undo(changes)
        if bool(off <= _CLOSE * before.norm()):
            return neurons
    raise UnsupportedModelError(
        f"it cannot be told where the neurons of the experts of {layer.name} are, so they cannot "
        "be aligned; pass align=False (--no-align) to average them as they stand"
    )


def _shuffled(stacks: Stacks, neurons: Neurons) -> dict[str, Tensor]:
    order = torch.randperm(neurons.size, generator=torch.Generator().manual_seed(0))
    if bool((order == torch.arange(neurons.size)).all()):
        order = order.flip(0)
    found = {}
    for name, stack in stacks.items():
        here = order.to(stack.device)
        found[name] = torch.stack([neurons.ordered(name, one, here) for one in stack])
    return found


def _readings(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Neurons]:
    """Every way to read the shapes, more neurons first: blocks of neurons can be reordered too."""
    every = {size for shape in shapes.values() for size in shape}
    for size in sorted(every | {one // 2 for one in every}, reverse=True):
        options = [_options(shape, size) for shape in shapes.values()]
        if size > 1:
            for places in product(*options):
                yield Neurons(size, dict(zip(shapes, places, strict=True)))


def _options(shape: Sequence[int], size: int) -> list[Place | None]:
    found: list[Place | None] = []
    for axis, length in enumerate(shape):
        if length == size:
            found.append(Place(axis, "one"))
        elif length == 2 * size:
            found += [Place(axis, "halves"), Place(axis, "pairs")]
    return [*found, None] if len(shape) == 1 else found


def weight_match(neurons: Neurons, one: Stacks, other: Stacks) -> Tensor:
    """Products of all weights of two experts' neurons: float64 (size, size)."""
    return _features(neurons, one) @ _features(neurons, other).T


def activity_match(neurons: Neurons, one: Stacks, other: Stacks, rows: Tensor) -> Tensor:
    """Cosines of two experts' neurons, of their weights and of what they make of tokens, added.

    Of the tokens `rows` (n, hidden), what a neuron makes is their projections before the
    nonlinearity.
    """
    weights = [_unit(_features(neurons, expert)) for expert in (one, other)]
    seen = [_unit(_projections(neurons, expert, rows)) for expert in (one, other)]
    return weights[0] @ weights[1].T + seen[0] @ seen[1].T


def _features(neurons: Neurons, expert: Stacks) -> Tensor:
    parts = [neurons.rows(name, value).flatten(1) for name, value in expert.items()]
    return torch.cat(parts, dim=1).double()


def _projections(neurons: Neurons, expert: Stacks, rows: Tensor) -> Tensor:
    """Tokens times the weights of each neuron that read them: (size, n_weights · n)."""
    matrices = [name for name, value in expert.items() if value.dim() > 1]
    found = []
    for name in matrices[:-1]:  # the last is what the outputs are made by
        parts = neurons.rows(name, expert[name]).double()  # (size, n, hidden)
        if parts.shape[-1] == rows.shape[1]:
            found.append((parts @ rows.double().T).flatten(1))
    return torch.cat(found, dim=1) if found else _features(neurons, expert)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-300)


def best_order(match: Tensor) -> Tensor:
    """For each neuron of one expert that of the other, all together matching best: (size,)."""
    _, order = linear_sum_assignment(match.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(match.device)
