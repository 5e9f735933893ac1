"""What is said of a model whose experts were merged, or became constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moecollab.models.keep import Keep
from moecollab.models.masked import PRUNED
from moecollab.models.routing import MoeLayer
from moecollab.models.uneven import Arrangement
from moecollab.pruning.card import Making
from moecollab.pruning.merging.averaging import Group
from moecollab.pruning.merging.deciding import Wanted
from moecollab.pruning.merging.methods import Method

NOVICES = "model with novices"


@dataclass(frozen=True)
class Told:
    """What is written beside a model.

    Parameters
    ----------
    arrangement : Arrangement
        What its layers hold.
    making : Making
        What its card says was done.
    note : dict
        What its ``moecollab.json`` says beside how layers are held.
    """

    arrangement: Arrangement
    making: Making
    note: dict[str, Any]


def of_groups(wanted: Wanted, groups: Mapping[int, Sequence[Group]], method: Method) -> Told:
    """What is said of merged experts."""
    members = {str(at): [list(one.members) for one in found] for at, found in groups.items()}
    shares = {str(at): [list(one.shares) for one in found] for at, found in groups.items()}
    how = {"how": method.name, "router": method.router, "align": method.align or "none"}
    note = {"kind": PRUNED, "merged": {**how, "groups": members, "shares": shares}}
    keep = places_of(wanted.keep, groups)
    making = Making(
        done="merging routed experts, without any training",
        heading="What was merged",
        lines=_group_lines([one.members for found in groups.values() for one in found], how),
        tag="merged",
        planned=wanted.groups is None,
    )
    return Told(Arrangement(keep, keep, native=False), making, note)


def _group_lines(groups: Sequence[tuple[int, ...]], how: Mapping[str, str]) -> tuple[str, ...]:
    several = [len(group) for group in groups if len(group) > 1]
    largest = f", the largest {max(several)}" if several else ""
    neurons = "as they were" if how["align"] == "none" else f"aligned by {how['align']}"
    return (
        f"- **Method**: {how['how']}; router row {how['router']}, neurons {neurons}.",
        f"- **Groups**: {len(groups)}, of which {len(several)} hold several experts{largest}. "
        "Members and their shares of the averages: `merged` in `moecollab.json`.",
    )


def places_of(keep: Keep, groups: Mapping[int, Sequence[Group]]) -> Keep:
    """The experts that give the groups their places, as what is kept."""
    kept = {layer: tuple(one.centre for one in found) for layer, found in groups.items()}
    counts = keep.experts_per_layer and tuple(keep.counts[layer] for layer in kept)
    return replace(keep, keep=kept, experts_per_layer=counts)


def of_novices(keep: Keep, layers: Sequence[MoeLayer]) -> Told:
    """What is said of experts that became constants; `keep` are the others."""
    constant = keep.n_sites - sum(map(len, keep.keep.values()))
    making = Making(
        done="turning routed experts into constants, without any training",
        title=f"{constant} of {keep.n_sites} experts constant",
        heading="What became constant",
        lines=(
            f"- **Method**: mone; {constant} experts became their mean output, which takes as many "
            "bytes. `experts` in `moecollab.json` are the others.",
        ),
        tag="merged",
    )
    return Told(Arrangement.as_is(layers), making, {"kind": NOVICES, "experts": keep.as_json()})
