"""Checkpoints whose layers keep different numbers of experts: how they are written and loaded.

Stock engines read one number of experts for all layers. So layers are either *padded* to the widest
with experts that no token can choose, or written *native*, each as it is, which only
:func:`moecollab.load_model` builds: the configuration then says the largest number, with which all
other loaders fail for the shapes of the weights, and the numbers of all layers beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from moecollab.errors import DataError, PlanError, SettingsError, UnsupportedModelError
from moecollab.models.groups import router_groups
from moecollab.models.keep import Keep
from moecollab.models.padding import BIASES, NEVER, barred
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import (
    Change,
    replace_tensor,
    router_rows,
    slice_experts,
    slice_router,
)

Uneven: TypeAlias = Literal["equalise", "pad", "native"]

ENTRY, COUNTS = "moecollab", "experts_per_layer"
"""Where a configuration says the numbers of native layers."""

_LEAKS = ("ernie4_5_moe", "ernie4_5_vl_moe", "longcat_flash", "zaya")
"""Families that choose by a softmax over all experts plus a bias: the padding has a part of it."""


@dataclass(frozen=True)
class Arrangement:
    """What a checkpoint holds of each layer, so that a plan of any numbers can be written.

    Parameters
    ----------
    keep : Keep
        The experts that can be chosen, as planned.
    held : Keep
        Those that are in the files: with padding, the same number in every layer.
    native : bool
        Whether layers hold different numbers.
    """

    keep: Keep
    held: Keep
    native: bool

    @classmethod
    def as_is(cls, layers: Sequence[MoeLayer]) -> Arrangement:
        """That of a model in memory: all experts that it has, without those that fill it up."""
        counts = tuple(layer.n_experts for layer in layers)
        differ, padding = len(set(counts)) > 1, barred(layers)
        ids = {layer.layer: tuple(range(layer.n_experts)) for layer in layers}
        held = Keep(ids, max(counts), layers[0].top_k, {}, counts if differ else None)
        real = {
            layer: tuple(one for one in all_ids if one not in padding.get(layer, ()))
            for layer, all_ids in ids.items()
        }
        return cls(replace(held, keep=real), held, native=differ)

    @property
    def count(self) -> int:
        """The number of experts that the configuration says: of the widest layer."""
        return max(len(held) for held in self.held.keep.values())

    @property
    def dummies(self) -> dict[int, list[int]]:
        """Places in the files, not original ids, of the experts that fill up each layer."""
        found = {}
        for layer, held in self.held.keep.items():
            real = set(self.keep.keep[layer])
            places = [place for place, expert in enumerate(held) if expert not in real]
            if places:
                found[layer] = places
        return found

    def config_entry(self) -> dict[str, Any]:
        """What ``config.json`` says besides the count."""
        if not self.native:
            return {}
        counts = {str(layer): len(held) for layer, held in self.held.keep.items()}
        return {ENTRY: {COUNTS: counts}}

    def note(self, original: Keep | None = None) -> dict[str, Any]:
        """What ``moecollab.json`` says: ids of the experts in the base, and how layers are held.

        `original` is what is kept by ids of the model that the base was cut from.
        """
        found: dict[str, Any] = {"experts": self.keep.as_json(), "loads": self.loads}
        found |= {} if original is None else {"original": original.as_json()}
        padding = {str(layer): places for layer, places in self.dummies.items()}
        return found | ({"padding": padding} if padding else {}) | self.config_entry()

    @property
    def loads(self) -> str:
        """Which engines load the checkpoint."""
        if self.native:
            return "loads with moecollab.load_model only; others stop at the shapes of the weights"
        exact = "; layers are padded with experts that cannot be chosen" if self.dummies else ""
        return f"loads in transformers and in engines that read one expert count{exact}"


def arranged(keep: Keep, uneven: Uneven | None, layers: list[MoeLayer]) -> Arrangement:
    """How a plan is written.

    Raises
    ------
    PlanError
        When layers keep different numbers and no way to write them is given.
    UnsupportedModelError
        When a router cannot be kept from choosing the experts of the padding.
    """
    if uneven is not None and uneven not in get_args(Uneven):
        raise SettingsError("uneven", uneven, f"None or one of {', '.join(get_args(Uneven))}")
    if keep.uniform:
        return Arrangement(keep, keep, native=False)
    if uneven == "native":
        return Arrangement(keep, keep, native=True)
    if uneven != "pad":
        raise _not_uniform(keep)
    for layer in layers:
        _choice_bias(layer)
    return Arrangement(keep, _padded(keep, layers), native=False)


def _not_uniform(keep: Keep) -> PlanError:
    counts = {layer: len(kept) for layer, kept in keep.keep.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return PlanError(
        f"layer {least} keeps {counts[least]} experts and layer {most} keeps {counts[most]}, but "
        "a checkpoint has one number for all layers; pass uneven='equalise', 'pad' or 'native' "
        "(--uneven), plan with per='layer' and an amount other than mass, or mask the model instead"
    )


def _padded(keep: Keep, layers: list[MoeLayer]) -> Keep:
    """The plan with as many experts of each router group as the widest layer has."""
    widest = max(len(kept) for kept in keep.keep.values())
    held = {}
    for layer in layers:
        groups = router_groups(layer)
        n_groups = 1 if groups is None else groups.count
        size, kept = layer.n_experts // n_groups, set(keep.keep[layer.layer])
        for first in range(0, layer.n_experts, size):
            free = [expert for expert in range(first, first + size) if expert not in kept]
            kept.update(free[: widest // n_groups - (size - len(free))])
        held[layer.layer] = tuple(sorted(kept))
        if len(kept) < widest:
            raise PlanError(
                f"layer {layer.layer} cannot be padded to {widest} experts, as it has "
                f"{layer.n_experts}; pass uneven='equalise' or 'native'"
            )
    return replace(keep, keep=held)


def bar(layer: MoeLayer, places: list[int]) -> Change:
    """Keeps a router from choosing some experts, by the bias that it adds to choose by."""
    owner, name, value = _choice_bias(layer)
    barred = value.detach().clone()
    barred[..., places] = NEVER
    return replace_tensor(owner, name, barred)


def _choice_bias(layer: MoeLayer) -> tuple[nn.Module, str, torch.Tensor]:
    """The bias that can bar an expert exactly: one that shifts no other expert's weight."""
    found = [row for row in router_rows(layer) if row[1] in BIASES]
    family = layer.layout.family
    if not found or family in _LEAKS:
        why = "chooses by a softmax over all experts" if found else "has no bias to choose by"
        raise UnsupportedModelError(
            f"layers of {family} cannot be padded, as their router {why}; pass "
            "uneven='equalise' or 'native', or mask the model instead"
        )
    return found[0]


def counts_of(config: Any) -> dict[int, int] | None:  # noqa: ANN401 (transformers is untyped)
    """Experts by layer that a configuration says beside the count; None where all are alike."""
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    found = entry.get(COUNTS) if isinstance(entry, Mapping) else None
    try:
        return {int(layer): int(count) for layer, count in found.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError) as cause:
        raise DataError(
            f"config.json has a {ENTRY!r} without {COUNTS} of numbers by layer; prune again"
        ) from cause


def shrink(model: nn.Module) -> None:
    """Cuts the modules of a model that was just built to the numbers its configuration says."""
    counts = counts_of(getattr(model, "config", None))
    if counts is None:
        return
    layers = find_moe_layers(model)
    if [layer.layer for layer in layers] != sorted(counts):
        raise DataError(
            f"config.json has {COUNTS} of layers {sorted(counts)} but the model has "
            f"{[layer.layer for layer in layers]}; prune again"
        )
    for layer in layers:
        count = counts[layer.layer]
        if not layer.top_k <= count <= layer.n_experts:
            raise DataError(
                f"config.json says {count} experts for layer {layer.layer}, which must be in "
                f"[{layer.top_k}, {layer.n_experts}]; prune again"
            )
        slice_router(layer, range(count))
        slice_experts(layer, range(count))


@contextmanager
def shrunk(kind: type[nn.Module]) -> Iterator[None]:
    """Shrinks models of a class as they are built, while the block runs.

    The loader of transformers builds a model from its configuration and then fills it; between the
    two there is no door.
    """
    build: Any = kind.__init__

    @wraps(build)
    def built(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        build(self, *args, **kwargs)
        shrink(self)

    kind.__init__ = built  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__init__ = build  # type: ignore[method-assign]
