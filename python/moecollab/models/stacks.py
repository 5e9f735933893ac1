"""All parameters of a layer's experts, stacked, however the family stores them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import Change, replace_tensor


def expert_stacks(layer: MoeLayer) -> dict[str, Tensor]:
    """Every tensor of the experts as (n_experts, …), by its path, in the order of the layout.

    Views where the family stores stacks; copies of experts that are modules.

    Raises
    ------
    UnsupportedModelError
        When the weights are quantised, or there are none.
    """
    if isinstance(layer.experts, nn.ModuleList):
        each = [dict(one.named_parameters()) for one in layer.experts]
        stacks = {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}
    else:
        found = ((path, _tensor(layer, path)) for path in layer.layout.tensors)
        stacks = {path: _stacked(layer, value) for path, value in found if value is not None}
    whole = all(value.is_floating_point() and value.dtype.itemsize > 1 for value in stacks.values())
    if not stacks or not whole:
        raise UnsupportedModelError(
            f"the experts of {layer.name} hold no numbers that can be averaged, as quantised "
            "weights do not; load the model in 16 or 32 bits"
        )
    return stacks


def replace_stacks(layer: MoeLayer, stacks: Mapping[str, Tensor]) -> list[Change]:
    """Puts stacks of as many experts as the container holds now in the place of its tensors.

    Slices past the experts, as some families have, stay.
    """
    changes = []
    for path, value in stacks.items():
        if isinstance(layer.experts, nn.ModuleList):
            for expert, one in zip(layer.experts, value, strict=True):
                changes.append(_replaced(expert, path, one.clone()))
        else:
            before = _tensor(layer, path)
            flat = value.reshape(-1, *value.shape[2:]) if layer.layout.flat else value
            past = flat[:0] if before is None else before[len(flat) :]
            changes.append(_replaced(layer.experts, path, torch.cat([flat, past])))
    return changes


def _replaced(module: nn.Module, path: str, value: Tensor) -> Change:
    parent, _, name = path.rpartition(".")
    return replace_tensor(module.get_submodule(parent), name, value)


def _tensor(layer: MoeLayer, path: str) -> Tensor | None:
    parent, _, name = path.rpartition(".")
    value = getattr(layer.experts.get_submodule(parent), name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _stacked(layer: MoeLayer, value: Tensor) -> Tensor:
    if layer.layout.flat:
        return value.reshape(layer.n_experts, -1, *value.shape[1:])
    return value[: layer.n_experts]
