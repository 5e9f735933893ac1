"""Making one expert of several: their weights, and the router's row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import Change, replace_tensor, router_rows
from moecollab.pruning.merging.neurons import Neurons, best_order
from moecollab.pruning.merging.seen import Matrix

Stacks = Mapping[str, Tensor]
Match = Callable[[Stacks, Stacks], Tensor]
"""How well the neurons of two experts go together: float64 (size, size)."""


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Parameters
    ----------
    members : tuple of int
        Expert ids, the one that gives the group its place among the experts first.
    shares : tuple of float
        Weights of their average, in the same order; they add up to 1.
    """

    members: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def centre(self) -> int:
        """The expert whose place in the model the group takes."""
        return self.members[0]


def make_group(members: Sequence[int], shares: Matrix | None, rank: Matrix | None) -> Group:
    """A group whose first member ranks highest; of equals the one with the smallest id.

    Parameters
    ----------
    members : sequence of int
        Expert ids.
    shares, rank : float64 array of shape (n_experts,), optional
        Non-negative; where shares are None, or all 0, every member counts alike.
    """
    ordered = sorted(members, key=lambda one: (0.0 if rank is None else -float(rank[one]), one))
    found = [1.0 if shares is None else float(shares[one]) for one in ordered]
    total = sum(found)
    weights = [one / total for one in found] if total > 0 else [1 / len(found)] * len(found)
    return Group(tuple(ordered), tuple(weights))


def averaged(
    stacks: Stacks, groups: Sequence[Group], neurons: Neurons | None, match: Match | None
) -> dict[str, Tensor]:
    """One expert for each group: its members' weights in the order of the first, averaged.

    Sums are taken in float64; an expert alone in its group stays as it is, bit for bit.

    Parameters
    ----------
    stacks : mapping of str to Tensor of shape (n_experts, …)
        All parameters of the experts.
    groups : sequence of Group
        In the order of the merged experts.
    neurons, match : optional
        Where the neurons are and how well those of two experts go together; experts are averaged
        as they stand if None.
    """
    made = [_merged(stacks, group, neurons, match) for group in groups]
    return {name: torch.stack([one[name] for one in made]) for name in stacks}


def _merged(
    stacks: Stacks, group: Group, neurons: Neurons | None, match: Match | None
) -> dict[str, Tensor]:
    first = {name: stack[group.centre] for name, stack in stacks.items()}
    if len(group.members) == 1:
        return first
    total = {name: group.shares[0] * value.double() for name, value in first.items()}
    for member, share in zip(group.members[1:], group.shares[1:], strict=True):
        expert = {name: stack[member] for name, stack in stacks.items()}
        if neurons is not None and match is not None:
            order = best_order(match(first, expert))
            expert = {name: neurons.ordered(name, one, order) for name, one in expert.items()}
        for name, value in expert.items():
            total[name] += share * value.double()
    return {name: value.to(first[name].dtype) for name, value in total.items()}


def average_rows(layer: MoeLayer, groups: Sequence[Group]) -> list[Change]:
    """Puts the average of a group's router entries, biases too, in its first member's place."""
    changes = []
    for owner, name, value in router_rows(layer):
        whole = value.detach().clone()
        entries = whole.T if whole.dim() == 2 and whole.shape[0] == 1 else whole
        for group in groups:
            if len(group.members) > 1:
                rows = entries[list(group.members)].double()
                shares = torch.tensor(group.shares, dtype=torch.float64, device=rows.device)
                entries[group.centre] = torch.tensordot(shares, rows, dims=1).to(entries.dtype)
        changes.append(replace_tensor(owner, name, whole))
    return changes
