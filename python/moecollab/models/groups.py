"""Groups of experts among which some routers choose before they choose experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecollab.models.routing import MoeLayer


@dataclass(frozen=True)
class RouterGroups:
    """Equal groups, in the order of the ids, of which a token's router chooses a few first.

    What is left of a layer must be equally many experts of every group; nothing in transformers
    checks this: unequal groups run, and choose other experts.

    Parameters
    ----------
    count : int
        Groups of a layer, ≥ 2.
    least : int
        Experts that every group must keep, for the router to score it and to fill its choice.
    """

    count: int
    least: int

    def as_json(self) -> dict[str, int]:
        """The same as plain data."""
        return {"count": self.count, "least": self.least}


def groups_from_json(value: Mapping[str, Any] | None) -> RouterGroups | None:
    """The groups in plain data; None where there are none."""
    return None if value is None else RouterGroups(int(value["count"]), int(value["least"]))


def router_groups(layer: MoeLayer) -> RouterGroups | None:
    """The groups of a layer's router, or None if it chooses among all experts."""
    router = layer.router
    count = getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1
    if count == 1 or getattr(router, "topk_method", "") == "greedy":
        return None
    chosen = getattr(router, "topk_group", None) or count
    # A router with a `topk_method` scores a group by its best expert, the others by the best two.
    scored_by = 1 if hasattr(router, "topk_method") else 2
    return RouterGroups(int(count), max(scored_by, -(-layer.top_k // int(chosen))))
