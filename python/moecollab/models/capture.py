"""Listening to the experts of one layer while a model runs, whatever calls them.

Most families call a container with hidden states, expert ids and weights; that call says what was
routed and with which coefficients, whatever the router did before. Families that do otherwise have
a class of their own here and name it in their layout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import UnsupportedModelError
from moecollab.models.adding_up import WeightedSum
from moecollab.models.expert_modules import ModulesCapture
from moecollab.models.listening import Capture, Listener
from moecollab.models.routing import Call, MoeLayer
from moecollab.models.special import ScaledInputCapture, SortedCapture
from moecollab.models.tap import TappedWeights

_ROUNDING = 0.05  # of sums in bfloat16
_ADD_UP: WeakSet[nn.Module] = WeakSet()  # containers whose outputs were found to add up

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class _CalledCapture(Capture):
    """Hooks on a container that is called with hidden states, ids and weights."""

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks before and, with outputs, after the container."""
        handles = [self.layer.experts.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.wants_outputs:
            handles.append(self.layer.experts.register_forward_hook(self._after))
        return handles

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        call = Call.read(args, kwargs)
        top_k = call.ids.shape[-1]
        # Copies, since the model may go on to change its tensors in place.
        ids = call.ids.detach().reshape(-1, top_k).clone()
        weights = call.weights.detach().reshape(-1, top_k).float().clone()
        self.listener.routing(ids, weights)
        if not self.wants_outputs:
            return None
        changed = self._changed(call, ids, weights)
        return changed.args, changed.kwargs

    @abstractmethod
    def _changed(self, call: Call, ids: Tensor, weights: Tensor) -> Call:
        """The call that the container gets instead, so that its outputs can be told."""

    @abstractmethod
    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Tells of what is not told yet; what it returns the container does, if not None."""


class ContainerCapture(_CalledCapture):
    """Hooks on a container that multiplies its outputs with the weights one by one.

    With outputs, the weights tell what they are multiplied with (:mod:`moecollab.models.tap`), so
    the model computes what it always does. That all slots are told is checked at every call, and at
    a container's first that what is told adds up to what it returns.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        super().__init__(layer, listener, outputs=outputs)
        self.missing = torch.empty(0, dtype=torch.bool)
        self.sum: WeightedSum | None = None

    def _changed(self, call: Call, ids: Tensor, weights: Tensor) -> Call:
        self.missing = ((ids < self.layer.n_experts) & (weights != 0)).reshape(-1)
        self.sum = None if self.layer.experts in _ADD_UP else WeightedSum(weights)
        return call.with_values(None, None, TappedWeights.of(call.weights, self._tell))

    def _tell(self, rows: Tensor, places: Tensor) -> None:
        self.missing[places.to(self.missing.device)] = False
        self.listener.outputs(rows.detach(), places)
        if self.sum is not None:
            self.sum.add(rows.detach(), places)

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
        told, self.sum = self.sum, None
        if told is None or told.rows is None:
            return True
        if told.rows.shape != total.shape:
            return False
        off = (told.rows.to(total.device) - total.float()).norm()
        if not bool(off.isfinite()):  # who listens names what is not finite
            return True
        # Rounding is that of the parts, which may cancel.
        if float(off) > _ROUNDING * float(told.sizes.sum()) ** 0.5:
            return False
        _ADD_UP.add(self.layer.experts)
        return True


class ExpandedCapture(_CalledCapture):
    """Hooks on a container that multiplies in a way of its own, such as by masks over all tokens.

    The container is handed one row per token and slot with weight 1, and the weighted sum is taken
    afterwards: any container that honours ids and weights can be listened to, at the cost of
    longer batches, and with a sum that is the model's to rounding.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        super().__init__(layer, listener, outputs=outputs)
        self.call: Call | None = None

    def _changed(self, call: Call, ids: Tensor, _weights: Tensor) -> Call:
        self.call = call
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1])  # (n_positions, hidden)
        ones = torch.ones_like(call.weights).reshape(-1, 1)
        rows = hidden.repeat_interleave(ids.shape[-1], dim=0)
        return call.with_values(rows, call.ids.reshape(-1, 1), ones)

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.call is None:
            return output
        call, self.call = self.call, None
        self.listener.outputs(output.detach(), torch.arange(len(output), device=output.device))
        slots = output.reshape(-1, call.ids.shape[-1], output.shape[-1])
        total = (slots * call.weights.reshape(*slots.shape[:2], 1)).sum(dim=1).to(output.dtype)
        self.listener.total(total)
        return total.reshape(*call.hidden.shape[:-1], output.shape[-1])


CAPTURES: dict[str, type[Capture]] = {
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
