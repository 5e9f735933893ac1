"""Which experts stay in each layer, and whether a model can do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from moecollab.errors import PlanError, SchemaError, UnsupportedModelError
from moecollab.manifest import read_json
from moecollab.models.groups import router_groups
from moecollab.models.padding import barred
from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import router_rows
from moecollab.models.widths import counts_from_json


class KeepsExperts(Protocol):
    """What masking needs of a plan."""

    @property
    def keep(self) -> Mapping[int, Sequence[int]]:
        """Kept expert ids by layer."""

    @property
    def n_experts(self) -> int:
        """Experts per layer before anything is dropped."""

    @property
    def top_k(self) -> int:
        """Experts per token."""


PlanLike: TypeAlias = KeepsExperts | str | PathLike[str]


@dataclass(frozen=True)
class Keep:
    """Kept expert ids of each layer, ascending."""

    keep: dict[int, tuple[int, ...]]
    n_experts: int
    """Experts of a layer before anything goes; the most that one has where layers differ."""
    top_k: int
    settings: Mapping[str, object] = field(default_factory=dict)
    """How the plan was made (criterion, drop, per), if that is known."""
    experts_per_layer: tuple[int, ...] | None = None
    """Experts of every layer before anything goes, where layers differ."""

    def __post_init__(self) -> None:
        """Refuses numbers of other layers than are kept."""
        counts = self.experts_per_layer
        if counts is not None and len(counts) != len(self.keep):
            raise PlanError(
                f"experts_per_layer has {len(counts)} numbers for {len(self.keep)} layers; give "
                "one for each layer, or None where all are alike"
            )

    @property
    def counts(self) -> dict[int, int]:
        """Experts of every layer before anything goes."""
        held = self.experts_per_layer or (self.n_experts,) * len(self.keep)
        return dict(zip(self.keep, held, strict=True))

    @property
    def n_sites(self) -> int:
        """Routed experts over all layers before anything goes."""
        return sum(self.counts.values())

    @property
    def cuts(self) -> bool:
        """Whether any expert goes."""
        return sum(map(len, self.keep.values())) < self.n_sites

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same number of experts."""
        return len({len(kept) for kept in self.keep.values()}) == 1

    def as_json(self) -> dict[str, object]:
        """The same as JSON values."""
        keep = {str(layer): list(kept) for layer, kept in self.keep.items()}
        found = {"keep": keep, "n_experts": self.n_experts, "top_k": self.top_k}
        if self.experts_per_layer is not None:
            found["experts_per_layer"] = list(self.experts_per_layer)
        return found | ({"settings": dict(self.settings)} if self.settings else {})


def read_keep(plan: PlanLike) -> Keep:
    """The kept experts of a plan or plan file."""
    if isinstance(plan, str | PathLike):
        return keep_from_json(read_json(Path(plan)), str(plan))
    keep = {int(layer): tuple(sorted(map(int, kept))) for layer, kept in plan.keep.items()}
    names = ("criterion", "drop", "per")
    settings = {name: getattr(plan, name) for name in names if hasattr(plan, name)}
    counts = getattr(plan, "experts_per_layer", None)
    return Keep(dict(sorted(keep.items())), int(plan.n_experts), int(plan.top_k), settings, counts)


def keep_from_json(value: Mapping[str, object], where: str) -> Keep:
    """The kept experts in a JSON object that has ``keep``, ``n_experts`` and ``top_k``."""
    keep, n_experts, top_k = (value.get(name) for name in ("keep", "n_experts", "top_k"))
    if (
        not isinstance(keep, Mapping)
        or not isinstance(n_experts, int)
        or not isinstance(top_k, int)
    ):
        raise SchemaError(
            f"{where} is not a plan: keep, n_experts or top_k is missing; make it again"
        )
    try:
        found = {int(layer): tuple(sorted(map(int, kept))) for layer, kept in keep.items()}
        counts = counts_from_json(value.get("experts_per_layer"), len(found))
    except (TypeError, ValueError) as cause:
        raise SchemaError(
            f"{where} has a keep list that is not of integers, or experts_per_layer that do not "
            "fit it; make it again"
        ) from cause
    settings = value.get("settings")
    made = settings if isinstance(settings, Mapping) else {}
    return Keep(dict(sorted(found.items())), n_experts, top_k, made, counts)


def check_keep(
    keep: Keep,
    layers: Sequence[MoeLayer],
    padding: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Raises unless the plan fits the model and its router can work with what is left.

    Parameters
    ----------
    keep : Keep
        The plan.
    layers : sequence of MoeLayer
        Those of the model that are looked at.
    padding : mapping of int to sequence of int, optional
        Experts by layer that only fill it up; read from the routers' biases if None, which takes
        loaded weights.

    Raises
    ------
    PlanError
        When layers or counts differ, a layer keeps padding or fewer than ``top_k`` experts, or the
        groups of a group-limited router keep unequal numbers.
    UnsupportedModelError
        When experts of the family cannot be cut.
    """
    check_routers(keep, layers)
    _check_padding(keep, barred(layers) if padding is None else padding)


def check_routers(keep: Keep, layers: Sequence[MoeLayer]) -> None:
    """The same, whatever the experts that stay are."""
    if layers[0].layout.fixed:
        layout = layers[0].layout
        raise UnsupportedModelError(
            f"experts of {layout.family} cannot be masked or cut yet: {layout.fixed}; "
            "recording and scoring work"
        )
    check_fits(keep, layers)
    for layer in layers:
        _check_router(keep.keep[layer.layer], layer)


def check_fits(keep: Keep, layers: Sequence[MoeLayer]) -> None:
    """Raises PlanError unless layers and ids are those of the model."""
    numbers = [layer.layer for layer in layers]
    if numbers != list(keep.keep):
        raise PlanError(
            f"the plan is for MoE layers {list(keep.keep)} but the model has {numbers}; "
            "make the plan from activations of this model"
        )
    for layer in layers:
        _check_ids(keep, layer)


def _check_padding(keep: Keep, padding: Mapping[int, Sequence[int]]) -> None:
    """Raises PlanError where padding stays, which routers choose when too few others are left."""
    for layer, ids in padding.items():
        kept = sorted(set(ids) & set(keep.keep.get(layer, ())))
        if kept:
            raise PlanError(
                f"layer {layer} would keep experts {kept}, which are padding that no token can "
                "choose; drop them, or take the model that was padded instead"
            )


def check_cut(layers: Sequence[MoeLayer]) -> None:
    """Raises UnsupportedModelError when experts can be masked but not cut."""
    layout = layers[0].layout
    if layout.uncut:
        raise UnsupportedModelError(
            f"experts of {layout.family} cannot be cut yet: {layout.uncut}; masking works"
        )


def check_untied(model: nn.Module, layers: Sequence[MoeLayer]) -> None:
    """Raises UnsupportedModelError when a tensor to be cut is used elsewhere too."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    for layer in layers:
        cut: list[Tensor] = [
            *layer.experts.parameters(),
            *(value for _, _, value in router_rows(layer)),
        ]
        for tensor in cut:
            used = names.get(id(tensor), [])
            other = [name for name in used if not name.startswith(f"{layer.name}.")]
            if other:
                raise UnsupportedModelError(
                    f"layer {layer.layer} cannot be cut, as {other[0]} is one tensor with its "
                    "own; give each its own copy, or mask the model instead"
                )


def _check_ids(keep: Keep, layer: MoeLayer) -> None:
    kept, count = keep.keep[layer.layer], keep.counts[layer.layer]
    if count != layer.n_experts:
        raise PlanError(
            f"the plan is for {count} experts but layer {layer.layer} has "
            f"{layer.n_experts}; make the plan from activations of this model"
        )
    if len(set(kept)) < len(kept) or (kept and not 0 <= kept[0] <= kept[-1] < layer.n_experts):
        raise PlanError(
            f"layer {layer.layer} keeps {list(kept)}, which are not distinct ids in "
            f"[0, {layer.n_experts}); correct the plan"
        )


def _check_router(kept: tuple[int, ...], layer: MoeLayer) -> None:
    if len(kept) < layer.top_k:
        raise PlanError(
            f"layer {layer.layer} would keep {len(kept)} experts but the router selects "
            f"top_k={layer.top_k}; drop fewer experts"
        )
    _check_groups(kept, layer)


def _check_groups(kept: tuple[int, ...], layer: MoeLayer) -> None:
    """Refuses what no router of groups can do with; see RouterGroups."""
    groups = router_groups(layer)
    if groups is None:
        return
    size = layer.n_experts // groups.count
    counts = [sum(expert // size == group for expert in kept) for group in range(groups.count)]
    if len(set(counts)) > 1:
        raise PlanError(
            f"layer {layer.layer} keeps {counts} experts in its {groups.count} router groups; "
            "a group-limited router needs the same number in every group"
        )
    if counts[0] < groups.least:
        raise PlanError(
            f"layer {layer.layer} keeps {counts[0]} experts in each router group, but the router "
            f"needs {groups.least} in each to select top_k={layer.top_k}; drop fewer experts"
        )
