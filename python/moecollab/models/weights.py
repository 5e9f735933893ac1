"""Parameters of experts and routers, read layer by layer: what needs no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.errors import UnsupportedModelError
from moecollab.models.loading import ModelLike, open_config, skeleton
from moecollab.models.masked import read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import router_rows
from moecollab.models.streamed import StreamedModel

Statistic: TypeAlias = Callable[[MoeLayer], NDArray[np.float64]]
"""Reads one layer; gives an array whose first axis is the layer's experts."""


@dataclass(frozen=True)
class ExpertWeights:
    """The parameters of a model's experts, of which one layer at a time is in memory.

    Parameters
    ----------
    model : Module, path or hub name
        A loaded model is read where it is; files are read layer by layer, without running anything.
    """

    model: ModelLike

    @cached_property
    def layers(self) -> list[MoeLayer]:
        """The MoE layers; of files, without their values.

        Raises
        ------
        UnsupportedModelError
            When the model is masked, dense, or of an unknown family.
        """
        if isinstance(self.model, nn.Module):
            return find_moe_layers(self.model)
        if read_masked(self.model) is not None:
            raise UnsupportedModelError(
                f"{self.model} is a masked model, whose routers lack rows; give the model that it "
                "masks"
            )
        return find_moe_layers(skeleton(open_config(str(self.model), moe=True)))

    def each(self, statistic: Statistic) -> NDArray[np.float64]:
        """A statistic of every layer: float64 array of shape (n_layers, n_experts, …).

        Where layers have different numbers of experts, it is 0 past a layer's own.
        """
        with torch.inference_mode():
            rows = [statistic(layer) for layer in self._loaded()]
        most = max(map(len, rows))
        found = np.zeros((len(rows), most, *rows[0].shape[1:]))
        for place, own in zip(found, rows, strict=True):
            place[: len(own)] = own
        return found

    def _loaded(self) -> Iterator[MoeLayer]:
        """The layers with their values, each until the next is asked for."""
        if isinstance(self.model, nn.Module):
            yield from self.layers
            return
        streamed = StreamedModel(self.model, device="cpu")
        for layer in find_moe_layers(streamed.model):
            with streamed.layer(layer.layer):
                yield layer


def expert_matrices(
    layer: MoeLayer, read: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[list[Tensor]]:
    """Weight matrices of every expert, as they are stored, without biases.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    read : callable
        What is read of a parameter: its value, or another tensor of its shape.

    Raises
    ------
    UnsupportedModelError
        When the weights are quantised.
    """
    experts = layer.experts
    found: list[list[Tensor]]
    if isinstance(experts, nn.ModuleList):
        found = [[read(value) for value in one.parameters() if value.dim() > 1] for one in experts]
    else:
        stacks = [_stack(layer, path, read) for path in layer.layout.tensors]
        whole = [stack for stack in stacks if stack is not None]
        found = [[stack[expert] for stack in whole] for expert in range(layer.n_experts)]
    if not all(one and all(value.is_floating_point() for value in one) for one in found):
        raise UnsupportedModelError(
            f"the experts of {layer.name} hold no matrices of floating point, as quantised weights "
            "do not; score the model in 16 or 32 bits"
        )
    return found


def _stack(layer: MoeLayer, path: str, read: Callable[[Tensor], Tensor]) -> Tensor | None:
    """One tensor of a container as (n_experts, …, …), or None if it is no stack of matrices."""
    parent, _, name = path.rpartition(".")
    value = getattr(layer.experts.get_submodule(parent), name, None)
    if not isinstance(value, Tensor):
        return None
    shape = (layer.n_experts, -1, *value.shape[1:]) if layer.layout.flat else value.shape
    return read(value).reshape(shape) if len(shape) > 2 else None


def router_matrix(layer: MoeLayer) -> Tensor:
    """The router's row of every expert: float32 tensor of shape (n_experts, n_inputs).

    Raises
    ------
    UnsupportedModelError
        When the router has fewer rows than there are experts, as that of a masked model.
    """
    weight = router_rows(layer)[0][2]
    if len(weight) < layer.n_experts:
        raise UnsupportedModelError(
            f"the router of layer {layer.layer} has {len(weight)} rows for {layer.n_experts} "
            "experts: the model is masked; remove the mask first"
        )
    return weight.detach()[: layer.n_experts].float()
