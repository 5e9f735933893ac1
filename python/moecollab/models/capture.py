"""Listening to the experts of one layer while a model runs, whatever calls them.

Most families call a container with hidden states, expert ids and weights; that call says what was
routed and with which coefficients, whatever the router did before. Families that do otherwise have
a class of their own here and name it in their layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.models.expert_modules import ModulesCapture
from moecollab.models.routing import Call, MoeLayer
from moecollab.models.special import ScaledInputCapture, SortedCapture


class Listener(Protocol):
    """Who is told what the experts of one layer do, in this order, once per call."""

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        """Expert ids and the coefficients of their outputs, both (n_positions, top_k).

        An id past the experts, or a weight of 0, is a slot that was not used.
        """

    def outputs(self, slots: Tensor) -> None:
        """Outputs before the weights, (n_positions, top_k, hidden); to be read at once."""

    def total(self, routed: Tensor) -> None:
        """Weighted sum of the outputs, (n_positions, hidden)."""


class Capture(Protocol):
    """Hooks on one layer that leave what the model computes as it is."""

    def attach(self) -> Sequence[RemovableHandle]:
        """Starts to listen; removing the handles ends it."""


class ContainerCapture:
    """Hooks on a container that is called with hidden states, ids and weights.

    With outputs, the container is handed one row per token and slot with weight 1, and the weighted
    sum is taken afterwards in the same order and precision: experts run once, and the model's
    outputs keep their bits under the default implementation of experts.

    Parameters
    ----------
    layer : MoeLayer
        The layer to listen to.
    listener : Listener
        Who is told.
    outputs : bool
        Whether to listen to expert outputs as well.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        self.layer = layer
        self.experts = layer.experts
        self.listener = listener
        self.wants_outputs = outputs
        self.call: Call | None = None

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks before and, with outputs, after the container."""
        handles = [self.experts.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.wants_outputs:
            handles.append(self.experts.register_forward_hook(self._after))
        return handles

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call.read(args, kwargs)
        top_k = call.ids.shape[-1]
        # Copies, since the model may go on to change its tensors in place.
        ids = call.ids.detach().reshape(-1, top_k).clone()
        self.listener.routing(ids, call.weights.detach().reshape(-1, top_k).float().clone())
        if not self.wants_outputs:
            return None
        self.call = call
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1])  # (n_positions, hidden)
        ones = torch.ones_like(call.weights).reshape(-1, 1)
        expanded = call.with_values(
            hidden.repeat_interleave(top_k, dim=0), *self._one_each(call.ids.reshape(-1, 1), ones)
        )
        return expanded.args, expanded.kwargs

    def _one_each(self, ids: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights of a call in which each row runs through one expert."""
        return ids, ones

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.call is None:
            return output
        call, self.call = self.call, None
        top_k = call.ids.shape[-1]
        slots = output.reshape(-1, top_k, output.shape[-1])  # (n_positions, top_k, hidden)
        self.listener.outputs(slots)
        total = _weighted(slots, call.weights.reshape(-1, top_k, 1)).sum(dim=1)
        total = total.to(output.dtype)  # (n_positions, hidden)
        self.listener.total(total)
        return total.reshape(*call.hidden.shape[:-1], output.shape[-1])


class IdentityCapture(ContainerCapture):
    """Hooks on a container with identity experts, which must get two slots a row or more.

    LongCat-Flash's loop over experts fails on rows of one slot, so every row gets a second slot of
    weight 0: the first identity expert, which costs nothing, or the same expert where there is
    none. The weighted sum holds what identity experts add.
    """

    def _one_each(self, ids: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        n_experts = self.layer.n_experts
        has_identity = getattr(self.experts, "total_experts", n_experts) > n_experts
        second = torch.full_like(ids, n_experts) if has_identity else ids
        return torch.cat([ids, second], dim=1), torch.cat([ones, torch.zeros_like(ones)], dim=1)


def _weighted(slots: Tensor, weights: Tensor) -> Tensor:
    """Slots times weights; in the memory of the slots, which nobody else has, where that fits."""
    if torch.result_type(slots, weights) == slots.dtype and not slots.requires_grad:
        return slots.mul_(weights)
    return slots * weights


CAPTURES: dict[str, Callable[..., Capture]] = {
    "container": ContainerCapture,
    "identity": IdentityCapture,
    "scaled_input": ScaledInputCapture,
    "sorted": SortedCapture,
    "modules": ModulesCapture,
}
"""Ways of listening, by the name that a layout gives them."""


def capture(layer: MoeLayer, listener: Listener, *, outputs: bool) -> Capture:
    """The way of listening that a layer's layout names."""
    return CAPTURES[layer.layout.capture](layer, listener, outputs=outputs)
