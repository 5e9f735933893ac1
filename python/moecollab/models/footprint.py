"""How many bytes of a checkpoint are experts, layer by layer, and how many are the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecollab.embedded import located
from moecollab.errors import UnsupportedModelError
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.loading import ModelLike, explained, open_config, skeleton
from moecollab.models.masked import read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import router_rows


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's tensors: what goes with each expert, and what stays whatever is dropped.

    Parameters
    ----------
    expert : tuple of float
        Bytes of one expert of every MoE layer, its entries of the router included.
    rest : float
        Bytes of all else.
    """

    expert: tuple[float, ...]
    rest: float

    @classmethod
    def of(cls, model: ModelLike) -> Footprint:
        """The footprint of a loaded model, or of files, of which the headers alone are read.

        In files, experts are taken to be stored in the type that most of the bytes are in.

        Raises
        ------
        DataError
            When there is no such model, or its files are damaged.
        UnsupportedModelError
            When files hold several weights in one number, as those quantised to 4 bits do.
        """
        model = located(model)
        if isinstance(model, nn.Module):
            held = {id(value): value for value in _saved(model)}
            total = sum(value.numel() * value.element_size() for value in held.values())
            return cls._split(find_moe_layers(model), total, None)
        masked = read_masked(model)
        path = str(model) if masked is None else masked[0]
        config = open_config(path, moe=True)
        with explained(path):
            stored = list(Checkpoint.open(path).tensors.values())
        bits: dict[Any, int] = {}
        for one in stored:
            bits[one.dtype] = bits.get(one.dtype, 0) + one.n_bytes
        kind = max(bits, key=lambda one: bits[one])
        if not (kind.is_floating_point or kind == torch.int8):
            raise UnsupportedModelError(
                f"{path} holds packed weights ({kind}), of which no expert's bytes are known; give "
                "a Footprint of expert=(bytes of one expert of each layer) and rest=(other bytes)"
            )
        layers = find_moe_layers(skeleton(config))
        return cls._split(layers, sum(bits.values()), kind)

    @classmethod
    def _split(cls, layers: list[MoeLayer], total: int, dtype: Any) -> Footprint:  # noqa: ANN401
        each = tuple(_bytes_per_expert(layer, dtype) for layer in layers)
        experts = sum(one * layer.n_experts for one, layer in zip(each, layers, strict=True))
        return cls(each, total - experts)


def _saved(model: nn.Module) -> list[Any]:
    """Parameters and buffers that a checkpoint holds."""
    return list(model.state_dict(keep_vars=True).values())


def _bytes_per_expert(layer: MoeLayer, dtype: Any) -> float:  # noqa: ANN401
    """Bytes of one expert and its router entries; in another type if one is given."""
    held: list[tuple[Tensor, int]] = [
        (value, layer.n_experts) for value in layer.experts.parameters()
    ]
    held += [(value, max(layer.n_experts, len(value))) for _, _, value in router_rows(layer)]
    return sum(
        value.numel() / entries * (value.element_size() if dtype is None else dtype.itemsize)
        for value, entries in held
    )
