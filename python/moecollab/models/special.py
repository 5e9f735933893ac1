"""Listening to experts that no container calls with ids and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.models.listening import Capture, Listener
from moecollab.models.routing import MoeLayer


class ScaledInputCapture(Capture):
    """Hooks on a layer whose gate multiplies the input of its experts (Llama 4).

    The layer adds Σ f(g x) over the chosen experts f with gates g: there is no coefficient of an
    output. The listener is told g as the weight and f(g x) / g as the output before it, so weight
    times output is exactly what an expert adds and the weighted sum is that of the layer, as in
    every other family. A gate of 0 is a slot that was not used. All experts run on all tokens
    anyway; nothing is computed twice.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        super().__init__(layer, listener, outputs=outputs)
        self.ids = self.gates = torch.empty(0)

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks after the router and, with outputs, after the experts."""
        handles = [self.layer.router.register_forward_hook(self._routed)]
        if self.wants_outputs:
            handles.append(self.layer.experts.register_forward_hook(self._ran))
        return handles

    def _routed(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        scores = output[0].detach()  # (n_positions, n_experts), 0 where not chosen
        # Read from the coefficients themselves: there are no others to be told.
        self.gates, self.ids = scores.topk(self.layer.top_k, dim=-1)
        self.listener.routing(self.ids, self.gates.float())

    def _ran(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        by_expert = output.detach().reshape(self.layer.n_experts, -1, output.shape[-1])
        token = torch.arange(by_expert.shape[1], device=output.device)
        added = by_expert[self.ids, token[:, None]]  # (n_positions, top_k, hidden)
        gates = torch.where(self.gates == 0, 1, self.gates)
        outputs = (added.float() / gates.float()[..., None]).reshape(-1, added.shape[-1])
        self.listener.outputs(outputs, torch.arange(len(outputs), device=output.device))
        self.listener.total(added.sum(dim=1))


class SortedCapture(Capture):
    """Hooks on experts that run on rows sorted by expert (JetMoE).

    The router returns, for each sorted row, its place among tokens × slots and its gate, and how
    many rows each expert gets; that gives ids and weights back exactly.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        super().__init__(layer, listener, outputs=outputs)
        self.order = self.weights = torch.empty(0)

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks after the router and, with outputs, after the last projection."""
        last = self.layer.experts.get_submodule("output_linear")
        handles = [self.layer.router.register_forward_hook(self._routed)]
        if self.wants_outputs:
            handles.append(last.register_forward_hook(self._ran))
        return handles

    def _routed(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        order, _, gates, sizes, _ = output
        experts = torch.arange(len(sizes), device=order.device)
        experts = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        self.order = order
        self.weights = self._unsorted(gates.detach())
        self.listener.routing(self._unsorted(experts), self.weights.float())

    def _ran(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self.listener.outputs(output.detach(), self.order)
        slots = self._unsorted(output.detach())  # (n_positions, top_k, hidden)
        self.listener.total((slots * self.weights[..., None]).sum(dim=1))

    def _unsorted(self, rows: Tensor) -> Tensor:
        """Sorted rows as (n_positions, top_k, …)."""
        placed = torch.empty_like(rows)
        placed[self.order] = rows
        return placed.reshape(-1, self.layer.top_k, *rows.shape[1:])
