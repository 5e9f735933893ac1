"""From a plan, or from groups as they are given, to the groups of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TypeAlias

import numpy as np

from moecollab.errors import PlanError
from moecollab.models.groups import router_groups
from moecollab.models.keep import Keep, KeepsExperts, read_keep
from moecollab.models.routing import MoeLayer
from moecollab.pruning.merging.averaging import Group, make_group
from moecollab.pruning.merging.methods import Method
from moecollab.pruning.merging.seen import Matrix, Recorded, Seen
from moecollab.pruning.plans import load_plan

GroupsLike: TypeAlias = Mapping[int, Sequence[Sequence[int]]]
"""Groups of expert ids by layer; each expert is in one."""


@dataclass(frozen=True)
class Wanted:
    """What is left of each layer.

    Parameters
    ----------
    keep : Keep
        Kept experts; of given groups the first of each.
    groups : mapping of int to sequence of sequence of int, optional
        Groups as they were given.
    """

    keep: Keep
    groups: GroupsLike | None = None


def read_wanted(
    plan: KeepsExperts | str | PathLike[str] | GroupsLike, layers: Sequence[MoeLayer]
) -> Wanted:
    """What a plan, its file, or groups by layer ask for.

    Raises
    ------
    PlanError
        When groups leave an expert out or name one twice.
    """
    if isinstance(plan, str | PathLike):
        return Wanted(read_keep(load_plan(plan)))
    if not isinstance(plan, Mapping):
        return Wanted(read_keep(plan))
    groups = {int(layer): [list(map(int, one)) for one in found] for layer, found in plan.items()}
    for layer in layers:
        _check_partition(layer, groups.get(layer.layer, []))
    kept = {layer: tuple(sorted(one[0] for one in found)) for layer, found in groups.items()}
    counts = [layer.n_experts for layer in layers]
    differ = tuple(counts) if len(set(counts)) > 1 else None
    keep = Keep(dict(sorted(kept.items())), max(counts), layers[0].top_k, experts_per_layer=differ)
    return Wanted(keep, groups)


def _check_partition(layer: MoeLayer, groups: Sequence[Sequence[int]]) -> None:
    named = sorted(expert for group in groups for expert in group)
    if named != list(range(layer.n_experts)) or not all(groups):
        raise PlanError(
            f"the groups of layer {layer.layer} name experts {named}; each of 0 to "
            f"{layer.n_experts - 1} must be in one group, and no group be empty"
        )


def decided(
    layer: MoeLayer, wanted: Wanted, method: Method, seen: Seen | Recorded | None
) -> list[Group]:
    """The groups of a layer, in the order of the experts that give them their places.

    Routers that limit groups of experts keep as many in each, since experts are merged within them.
    """
    shares, rank = _weights(method, seen)
    if wanted.groups is not None:
        found = [list(group) for group in wanted.groups[layer.layer]]
    else:
        kept = wanted.keep.keep[layer.layer]
        found = []
        for inside in _blocks(layer):
            found += method.grouping(seen, inside, [one for one in kept if one in inside])
        if method.centred:
            rank = np.isin(np.arange(layer.n_experts), kept).astype(np.float64)
    groups = [make_group(members, shares, rank) for members in found]
    return sorted(groups, key=lambda group: group.centre)


def _weights(method: Method, seen: Seen | Recorded | None) -> tuple[Matrix | None, Matrix | None]:
    """By what weights are averaged and by what the first of a group is found; None for alike."""
    if seen is None:
        return None, None
    if method.shares == "saliency" and isinstance(seen, Seen):
        return seen.saliency, seen.saliency
    return (None if method.shares == "equal" else seen.counts), seen.counts


def _blocks(layer: MoeLayer) -> list[range]:
    """Experts that may be merged with each other."""
    groups = router_groups(layer)
    size = layer.n_experts // (1 if groups is None else groups.count)
    return [range(start, start + size) for start in range(0, layer.n_experts, size)]
