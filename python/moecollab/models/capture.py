"""Listening to the experts of one layer while a model runs, whatever calls them.

Most families call a container with hidden states, expert ids and weights; that call says what was
routed and with which coefficients, whatever the router did before. Families that do otherwise have
a class of their own here and name it in their layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import UnsupportedModelError
from moecollab.models.expert_modules import ModulesCapture
from moecollab.models.routing import Call, MoeLayer
from moecollab.models.special import ScaledInputCapture, SortedCapture
from moecollab.models.tap import TappedWeights

_ROUNDING = 0.05  # of sums in bfloat16
_ADD_UP: WeakSet[nn.Module] = WeakSet()  # containers whose outputs were found to add up


class Listener(Protocol):
    """Who is told what the experts of one layer do, in this order, once per call."""

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        """Expert ids and the coefficients of their outputs, both (n_positions, top_k).

        An id past the experts, or a weight of 0, is a slot that was not used.
        """

    def outputs(self, rows: Tensor, places: Tensor) -> None:
        """Some outputs before the weights, (n, hidden), to be read at once; each slot comes once.

        `places`, (n,), says which they are: position · top_k + slot.
        """

    def total(self, routed: Tensor) -> None:
        """Weighted sum of the outputs, (n_positions, hidden)."""


class Capture(Protocol):
    """Hooks on one layer that leave what the model computes as it is."""

    def attach(self) -> Sequence[RemovableHandle]:
        """Starts to listen; removing the handles ends it."""


class ContainerCapture:
    """Hooks on a container that is called with hidden states, ids and weights.

    With outputs, the weights tell what they are multiplied with (:mod:`moecollab.models.tap`), so
    the model computes what it always does. That all slots are told is checked at every call, and at
    a container's first that what is told adds up to what it returns.

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
        self.listener = listener
        self.wants_outputs = outputs
        self.missing = torch.empty(0, dtype=torch.bool)
        self.weights = torch.empty(0)
        self.sum: Tensor | None = None
        self.size = 0.0
        self.sum_checked = layer.experts in _ADD_UP

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks before and, with outputs, after the container."""
        handles = [self.layer.experts.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.wants_outputs:
            handles.append(self.layer.experts.register_forward_hook(self._after))
        return handles

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call.read(args, kwargs)
        top_k = call.ids.shape[-1]
        # Copies, since the model may go on to change its tensors in place.
        ids = call.ids.detach().reshape(-1, top_k).clone()
        weights = call.weights.detach().reshape(-1, top_k).float().clone()
        self.listener.routing(ids, weights)
        if not self.wants_outputs:
            return None
        self.missing = ((ids < self.layer.n_experts) & (weights != 0)).reshape(-1)
        self.weights, self.sum, self.size = weights, None, 0.0
        tapped = call.with_values(None, None, TappedWeights.of(call.weights, self._tell))
        return tapped.args, tapped.kwargs

    def _tell(self, rows: Tensor, places: Tensor) -> None:
        self.missing[places.to(self.missing.device)] = False
        self.listener.outputs(rows.detach(), places)
        if not self.sum_checked:
            self._add(rows.detach(), places.to(self.weights.device))

    def _add(self, rows: Tensor, places: Tensor) -> None:
        n_positions, top_k = self.weights.shape
        if self.sum is None:
            self.sum = rows.new_zeros((n_positions, rows.shape[-1]), dtype=torch.float32)
        weights = self.weights.reshape(-1)[places].to(rows.device)
        # A place that is not used may hold anything.
        rows = torch.where(weights[:, None] != 0, rows.float() * weights[:, None], 0)
        self.sum.index_add_(0, (places // top_k).to(rows.device), rows)
        self.size += float(rows.square().sum())

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        total = output.detach().reshape(-1, output.shape[-1])
        if bool(self.missing.any()) or not self._adds_up(total):
            raise UnsupportedModelError(
                f"the experts of {self.layer.name} ({type(self.layer.experts).__name__}) do not "
                "multiply their outputs with the routing weights one by one; record without norms, "
                "or register the layout again with capture='expanded'"
            )
        self.listener.total(total)

    def _adds_up(self, total: Tensor) -> bool:
        """Whether what was told at the first call is what the container returned, to rounding."""
        if self.sum is None:
            return True
        if self.sum.shape != total.shape:
            return False
        off = (self.sum.to(total.device) - total.float()).norm()
        self.sum, self.sum_checked = None, True
        if not bool(off.isfinite()):  # who listens names what is not finite
            return True
        # Rounding is that of the parts, which may cancel.
        if float(off) > _ROUNDING * self.size**0.5:
            return False
        _ADD_UP.add(self.layer.experts)
        return True


class ExpandedCapture:
    """Hooks on a container that multiplies in a way of its own, such as by masks over all tokens.

    The container is handed one row per token and slot with weight 1, and the weighted sum is taken
    afterwards: any container that honours ids and weights can be listened to, at the cost of
    longer batches, and with a sum that is the model's to rounding.

    Parameters
    ----------
    layer, listener, outputs :
        As of :class:`ContainerCapture`.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        self.layer = layer
        self.listener = listener
        self.wants_outputs = outputs
        self.call: Call | None = None

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks before and, with outputs, after the container."""
        handles = [self.layer.experts.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.wants_outputs:
            handles.append(self.layer.experts.register_forward_hook(self._after))
        return handles

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call.read(args, kwargs)
        top_k = call.ids.shape[-1]
        ids = call.ids.detach().reshape(-1, top_k).clone()
        self.listener.routing(ids, call.weights.detach().reshape(-1, top_k).float().clone())
        if not self.wants_outputs:
            return None
        self.call = call
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1])  # (n_positions, hidden)
        ones = torch.ones_like(call.weights).reshape(-1, 1)
        rows = hidden.repeat_interleave(top_k, dim=0)
        expanded = call.with_values(rows, call.ids.reshape(-1, 1), ones)
        return expanded.args, expanded.kwargs

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.call is None:
            return output
        call, self.call = self.call, None
        self.listener.outputs(output.detach(), torch.arange(len(output), device=output.device))
        slots = output.reshape(-1, call.ids.shape[-1], output.shape[-1])
        total = (slots * call.weights.reshape(*slots.shape[:2], 1)).sum(dim=1).to(output.dtype)
        self.listener.total(total)
        return total.reshape(*call.hidden.shape[:-1], output.shape[-1])


CAPTURES: dict[str, Callable[..., Capture]] = {
    "container": ContainerCapture,
    "expanded": ExpandedCapture,
    "scaled_input": ScaledInputCapture,
    "sorted": SortedCapture,
    "modules": ModulesCapture,
}
"""Ways of listening, by the name that a layout gives them."""


def capture(layer: MoeLayer, listener: Listener, *, outputs: bool) -> Capture:
    """The way of listening that a layer's layout names."""
    return CAPTURES[layer.layout.capture](layer, listener, outputs=outputs)
