"""Dropped experts that become constants: MoNE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import all_or_nothing
from moecollab.models.stacks import expert_stacks, replace_stacks
from moecollab.pruning.merging.deciding import Wanted
from moecollab.pruning.merging.evidence import Source
from moecollab.pruning.merging.seen import Matrix, observe


def with_novices(layers: Sequence[MoeLayer], wanted: Wanted, source: Source) -> None:
    """Turns the experts that go into constants, or changes nothing.

    Source: MoNE, Zhang et al. 2025 (arXiv:2507.00390). An expert becomes its mean output over the
    tokens routed to it: all its weights 0, the bias of its last projection the mean. Stock models
    store a constant in as many bytes as an expert, so nothing gets smaller: what is saved is the
    arithmetic of an engine that knows. The paper stores one vector and has model code of its own.

    Raises
    ------
    UnsupportedModelError
        When the experts have no bias that is added last.
    """
    for layer in layers:
        _bias(layer)
    with all_or_nothing() as changes:
        for layer, means in _means(layers, source):
            gone = sorted(set(range(layer.n_experts)) - set(wanted.keep.keep[layer.layer]))
            changes += replace_stacks(layer, _constants(layer, gone, means))


def _means(layers: Sequence[MoeLayer], source: Source) -> list[tuple[MoeLayer, Matrix]]:
    """Mean output of each layer's experts over the tokens routed to them, before any changes."""
    if source.corpus is not None:
        seen = observe(source.model, layers, source.windows, router=False)
        return [(one.layer, one.routed_means) for one in seen]
    return [(layer, known.means) for layer, known in source.recorded(layers)]


def _constants(layer: MoeLayer, gone: Sequence[int], means: Matrix) -> dict[str, Tensor]:
    """The experts' tensors with those that go zero but for their last bias."""
    last, found = _bias(layer), {}
    for name, stack in expert_stacks(layer).items():
        found[name] = stack.clone()
        found[name][list(gone)] = 0
    found[last][list(gone)] = torch.from_numpy(means[list(gone)]).to(found[last])
    return found


def _bias(layer: MoeLayer) -> str:
    """Name of the bias that an expert adds last."""
    names = [name for name, value in expert_stacks(layer).items() if value.dim() == 2]
    found = [
        name
        for name in names
        if name.rpartition(".")[2].startswith("down_proj")
        or name.endswith(("down_proj.bias", "w2.bias", "fc2.bias"))
    ]
    if not found:
        raise UnsupportedModelError(
            f"the experts of {layer.layout.family} have no bias after their last projection, so "
            "none can be a constant (mone); drop or merge them instead"
        )
    return found[-1]
