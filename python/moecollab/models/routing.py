"""The MoE layers of a model, and reading the call that carries the routing.

Routed experts are containers called with hidden states, expert ids and weights. Those are the ids
and coefficients that truly multiply the experts' outputs, whatever the router did before, so this
call is where routing is recorded and where ids are mapped.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.layout import CONFIG_COUNTS, Layout
from moecollab.models.registry import layout_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Types of expert ids."""


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a loaded model.

    Parameters
    ----------
    layer : int
        The model's own decoder-layer index.
    name : str
        Path of the block in the model.
    block, router, experts : Module
        The block and, in it, what scores the experts and what runs them.
    n_experts : int
        Routed experts in the container.
    top_k : int
        Experts per token.
    layout : Layout
        What must be cut when experts go.
    """

    layer: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    n_experts: int
    top_k: int
    layout: Layout

    @property
    def scale(self) -> float:
        """Factor of the block on the weighted sum of the outputs, beyond the weights."""
        if not self.layout.scale:
            return 1.0
        value = _named_in(self.block, "scale", self.layout)
        if isinstance(value, str):
            averaged = value == "average" and getattr(self.block, "num_shared_experts", 1) > 0
            return 0.5 if averaged else 1.0
        return float(value)


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model, in order.

    Raises
    ------
    UnsupportedModelError
        When the model is dense, of an unknown family, compiled, or has several containers in a
        layer.
    """
    _check_eager(model)
    config = text_config(model)
    layout = _layout(model, config)
    layers = [_moe_layer(model, name, layout, config) for name in _blocks(model, layout, config)]
    if not layers:
        raise _otherwise(model, layout) if _named(model, layout) else _dense(model)
    layers.sort(key=lambda layer: layer.layer)
    numbers = [layer.layer for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has several expert containers in one layer "
            f"({layers[0].name}, {layers[1].name}); such models are not supported"
        )
    return layers


def _check_eager(model: nn.Module) -> None:
    """Refuses what torch.compile made: with some hooks it fails while it is traced."""
    for name, module in model.named_modules():
        own = vars(module)
        traced = hasattr(own.get("forward"), "_torchdynamo_orig_callable")
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None or traced:
            where = name or "the model"
            raise UnsupportedModelError(
                f"{where} is compiled by torch.compile, which cannot be relied on to run the hooks "
                "that listen and mask; load the model again and leave out what compiles it"
            )


def _named(model: nn.Module, layout: Layout) -> bool:
    """Whether a model has modules of the name that experts have in its family."""
    return layout.container and any(
        f".{name}".endswith(f".{layout.experts}") for name, _ in model.named_modules()
    )


def _otherwise(model: nn.Module, layout: Layout) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} has modules named {layout.experts!r} that are not called with ids "
        "and weights, as those of older versions of transformers; install a newer transformers, or "
        f"register a layout for {layout.family!r} with another `capture`"
    )


def _blocks(model: nn.Module, layout: Layout, config: Any) -> list[str]:  # noqa: ANN401
    """Paths of the blocks that hold routed experts, those of the text part only."""
    suffix = f".{layout.experts}"
    found: dict[str, list[str]] = {}  # by the module that holds the numbered layers
    for name, module in model.named_modules():
        inside = f".{name}".endswith(suffix) and _holds_experts(module, layout)
        block = name.removesuffix(layout.experts).rstrip(".")
        if inside:
            holder = re.split(r"(?:^|\.)\d+(?:\.|$)", block)[0].rpartition(".")[0]
            found.setdefault(holder, []).append(block)
    if len(found) > 1:  # vision or speech experts beside those of the text
        own = {
            holder: blocks for holder, blocks in found.items() if _is_text(model, holder, config)
        }
        found = own or found
    return [block for blocks in found.values() for block in blocks]


def _holds_experts(module: nn.Module, layout: Layout) -> bool:
    """Whether a module of the right name is what the layout says."""
    return (
        takes_routing(module) if layout.container else next(module.parameters(), None) is not None
    )


def _is_text(model: nn.Module, holder: str, config: Any) -> bool:  # noqa: ANN401
    """Whether a part of a model was built from the configuration of its text part."""
    own = getattr(model.get_submodule(holder), "config", None)
    return bool(getattr(own, "model_type", None) == config.model_type)


def text_config(model: nn.Module) -> Any:  # noqa: ANN401 (transformers is untyped)
    """The configuration of the model's text part."""
    config = getattr(model, "config", None)
    if config is None:
        raise DataError(
            f"{type(model).__name__} has no config; pass a transformers model or a path to one"
        )
    return config.get_text_config()


def takes_routing(module: nn.Module) -> bool:
    """Whether a module is called with hidden states, expert ids and weights."""
    if type(module).forward is nn.Module.forward or type(module) is nn.ModuleList:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 4


def _layout(model: nn.Module, config: Any) -> Layout:  # noqa: ANN401
    """The layout of the model's family; a dense model gets its own error."""
    try:
        return layout_of(config.model_type, type(model).__name__)
    except UnsupportedModelError:
        named = any("experts" in name.split(".") for name, _ in model.named_modules())
        if named or any((getattr(config, field, 0) or 0) for field in CONFIG_COUNTS):
            raise
        raise _dense(model) from None


def _dense(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} is a dense model: it has no routed experts to record or cut; "
        "choose a Mixture-of-Experts model"
    )


def _moe_layer(
    model: nn.Module,
    name: str,
    layout: Layout,
    config: Any,  # noqa: ANN401
) -> MoeLayer:
    block = model.get_submodule(name)
    router, experts = _named_in(block, "router", layout), block.get_submodule(layout.experts)
    _check_called(name, experts, layout)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number is None:
        raise UnsupportedModelError(
            f"{name} is in no numbered layer; such models are not supported"
        )
    top_k = getattr(router, "top_k", None) or _named_in(config, "top_k", layout)
    return MoeLayer(
        layer=int(number[1]),
        name=name,
        block=block,
        router=router,
        experts=experts,
        n_experts=_n_experts(experts, layout),
        top_k=int(top_k),
        layout=layout,
    )


def _named_in(owner: Any, field: str, layout: Layout) -> Any:  # noqa: ANN401
    """What a field of a layout names in a block or in a configuration."""
    name = getattr(layout, field)
    try:
        return attrgetter(name)(owner)
    except AttributeError as cause:
        raise UnsupportedModelError(
            f"{type(owner).__name__} has no {name!r}, which the layout of {layout.family!r} names "
            f"as its {field}; register the layout again with {field}=<what it is called there>"
        ) from cause


def _check_called(name: str, experts: nn.Module, layout: Layout) -> None:
    """Refuses to wait for a list to be called, or for the parts of what is not a list."""
    listed = isinstance(experts, nn.ModuleList)
    called = type(experts).forward is not nn.ModuleList.forward
    if (layout.capture == "modules" and not listed) or (layout.capture != "modules" and not called):
        fits = "capture='modules'" if listed else "another capture than 'modules'"
        raise UnsupportedModelError(
            f"the experts of {name} are a {type(experts).__name__}, which capture="
            f"{layout.capture!r} cannot listen to; register the layout of {layout.family!r} again "
            f"with {fits}"
        )


def _n_experts(experts: nn.Module, layout: Layout) -> int:
    """Experts in a container: its slices where they are 3-D, else what it says."""
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    if layout.flat:
        return int(vars(experts)["num_experts"])
    sizes = [
        tensor.shape[0] for name, tensor in experts.named_parameters() if name in layout.tensors
    ]
    if not sizes:
        raise UnsupportedModelError(
            f"{type(experts).__name__} holds none of {', '.join(layout.tensors)}; "
            "register a layout with the names of its tensors"
        )
    return min(sizes)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an experts container, whatever their names.

    Parameters
    ----------
    args, kwargs :
        As the container got them.
    where : tuple of int or str
        Position or name of the hidden states, the ids and the weights.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: tuple[int | str, int | str, int | str]

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Tells the arguments apart by dtype and order."""
        found: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        tensors = [(key, value) for key, value in found if isinstance(value, Tensor)]
        ids = [key for key, value in tensors if value.dtype in INTEGERS]
        floats = [key for key, value in tensors if value.is_floating_point()]
        if len(ids) != 1 or len(floats) != 2:
            raise UnsupportedModelError(
                f"an experts container was called with {len(ids)} integer and {len(floats)} "
                "floating tensors; expected hidden states, ids and weights"
            )
        return cls(args, kwargs, (floats[0], ids[0], floats[1]))

    def _get(self, role: int) -> Tensor:
        key = self.where[role]
        value: Tensor = self.args[key] if isinstance(key, int) else self.kwargs[key]
        return value

    @property
    def hidden(self) -> Tensor:
        """Hidden states, (…, hidden)."""
        return self._get(0)

    @property
    def ids(self) -> Tensor:
        """Expert ids, (n_tokens, top_k)."""
        return self._get(1)

    @property
    def weights(self) -> Tensor:
        """Coefficients of the experts' outputs, (n_tokens, top_k)."""
        return self._get(2)

    def with_values(self, *values: Tensor | None) -> Call:
        """The same call with other hidden states, ids and weights; None leaves one."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, value in zip(self.where, values, strict=True):
            if value is None:
                continue
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return replace(self, args=tuple(args), kwargs=kwargs)
