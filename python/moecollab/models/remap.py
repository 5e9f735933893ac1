"""From the experts that a cut router knows to those of the layer: the other half of a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import INTEGERS, Call, MoeLayer


def remap(layer: MoeLayer, kept: Sequence[int]) -> RemovableHandle:
    """A hook that turns experts among the kept ones into the layer's own.

    It comes first of all hooks, so that whoever listens is told original ids.
    """
    original = _Original(kept, layer.n_experts)
    if layer.layout.container:
        return layer.experts.register_forward_pre_hook(original, prepend=True, with_kwargs=True)
    mapped = _AFTER_ROUTER[layer.layout.capture]
    if layer.layout.routing is not None:
        mapped = _wide_logits

    return layer.router.register_forward_hook(_Mapped(original, mapped), prepend=True)


def masks_first(hooks: dict[int, Callable[..., Any]]) -> None:
    """Brings the hooks of masks before all others of a module, who need the ids they give."""
    others = [key for key, hook in hooks.items() if not isinstance(hook, _Original | _Mapped)]
    hooks.update({key: hooks.pop(key) for key in others})


class _Original:
    """Ids of the kept experts of a layer; a pre-hook of containers that are called with ids."""

    def __init__(self, kept: Sequence[int], n_experts: int) -> None:
        self.kept = torch.tensor(list(kept))
        self.n_experts = n_experts

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Maps the ids of one call."""
        call = Call.read(args, kwargs)
        mapped = call.with_values(None, self.ids(call.ids), None)
        return mapped.args, mapped.kwargs

    def ids(self, ids: Tensor) -> Tensor:
        """Original ids of kept ones; ids past the experts stay past them."""
        if self.kept.device != ids.device:
            self.kept = self.kept.to(ids.device)
        n_kept = len(self.kept)
        inside = self.kept[ids.long().clamp(max=n_kept - 1)].to(ids.dtype)
        return torch.where(ids < n_kept, inside, ids + (self.n_experts - n_kept))

    def wide(self, values: Tensor, fill: float) -> Tensor:
        """Columns of kept experts (…, n_kept) among those of all (…, n_experts)."""
        full = values.new_full((*values.shape[:-1], self.n_experts), fill)
        full[..., self.kept.to(values.device)] = values
        return full


class _Mapped:
    """A hook after routers, which turns what they return into what the layer's own would."""

    def __init__(self, original: _Original, mapped: Callable[[Any, _Original], Any]) -> None:
        self.original = original
        self.mapped = mapped

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        """Maps one output."""
        return self.mapped(output, self.original)


def _wide_scores(output: Any, original: _Original) -> Any:  # noqa: ANN401
    """Scores, 0 where not chosen, and logits of Llama 4."""
    scores, logits = output
    return original.wide(scores, 0.0), original.wide(logits, -torch.inf)


def _all_sizes(output: Any, original: _Original) -> Any:  # noqa: ANN401
    """Rows per expert, and logits, of JetMoE; the order of the rows stays."""
    order, token, gates, sizes, logits = output
    rows = dict(zip(original.kept.tolist(), sizes, strict=True))
    every = [rows.get(expert, 0) for expert in range(original.n_experts)]
    return order, token, gates, every, original.wide(logits, -torch.inf)


def _returned_ids(output: Any, original: _Original) -> Any:  # noqa: ANN401
    """The ids among what a router returns."""
    return tuple(
        original.ids(part) if isinstance(part, Tensor) and part.dtype in INTEGERS else part
        for part in output
    )


def _wide_logits(output: Any, original: _Original) -> Any:  # noqa: ANN401
    """Logits with which no router chooses a dropped expert."""
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"a router that returns {type(output).__name__} cannot be masked; its layout's "
            "`routing` is for routers that return logits alone"
        )
    return original.wide(output, -torch.inf)


_AFTER_ROUTER: dict[str, Callable[[Any, _Original], Any]] = {
    "scaled_input": _wide_scores,
    "sorted": _all_sizes,
    "modules": _returned_ids,
}
