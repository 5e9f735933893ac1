"""A gain of 1 on what each chosen expert adds for each token, to differentiate by.

The gradient of a loss by such a gain is the gradient by the layer's sum, times what the expert
added; no output needs to be kept for it but those that the backward pass keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.criteria.base import Evidence
from moecollab.criteria.probing.probing import (
    Model,
    differentiable,
    finite,
    inputs_of,
    logits_in,
    subject,
)
from moecollab.models.routing import Call, MoeLayer
from moecollab.progress import track

Slots: TypeAlias = list[tuple[Tensor, Tensor]]
"""Expert ids and gains of the slots of some calls, both of shape (n,)."""


def fisher_information(evidence: Evidence) -> NDArray[np.float64]:
    """Σ_t (∂ log p / ∂ gain)² per token, of words drawn from the model: (n_layers, n_experts)."""
    model, layers, windows = subject(evidence)
    found = np.zeros(evidence.shape)
    with differentiable(model), track("differentiating", len(windows)) as bar:
        for number, window in enumerate(windows):
            draw = torch.Generator().manual_seed(evidence.seed + (number << 32))
            where = f"window {number} of the text"
            found += evidence.stacked(_of_window(model, layers, window, draw, where))
            bar.advance()
    return found / sum(map(len, windows))


def _of_window(
    model: Model,
    layers: Sequence[MoeLayer],
    window: NDArray[np.int64],
    draw: torch.Generator,
    where: str,
) -> list[NDArray[np.float64]]:
    """Sums of squares over the tokens of one window, of every layer's experts."""
    with ExitStack() as stack:
        slots = [stack.enter_context(gains(layer)) for layer in layers]
        logits = logits_in(model, model(**inputs_of(model, window)))[0].float()
    finite(logits.detach().sum(dtype=torch.float64)[None], where)
    words = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=draw)
    loss = torch.nn.functional.cross_entropy(logits, words[:, 0].to(logits.device), reduction="sum")
    leaves = [gain for own in slots for _, gain in own]
    slopes = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    found = []
    for layer, own in zip(layers, slots, strict=True):
        experts = [ids for ids, _ in own]
        found.append(_squares(layer.n_experts, experts, [next(slopes) for _ in own]))
    return found


def _squares(
    n_experts: int, experts: Sequence[Tensor], slopes: Sequence[Tensor | None]
) -> NDArray[np.float64]:
    """Sums of squared slopes by expert: float64 (n_experts,)."""
    found = np.zeros(n_experts)
    for own, slope in zip(experts, slopes, strict=True):
        if slope is not None:
            squares = slope.double().square().reshape(-1).cpu().numpy()
            ids = own.cpu().numpy()
            used = ids < n_experts  # past them are slots that were not used
            found += np.bincount(ids[used], squares[used], n_experts)
    return found


@contextmanager
def gains(layer: MoeLayer) -> Iterator[Slots]:
    """Multiplies what chosen experts add by gains of 1 while a ``with`` block runs."""
    slots: Slots = []
    handles = _ATTACH[layer.layout.capture](layer, slots)
    try:
        yield slots
    finally:
        for handle in handles:
            handle.remove()


def _ones(slots: Slots, experts: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """New gains of some slots, in float32."""
    gain = torch.ones(shape, device=experts.device, requires_grad=True)
    slots.append((experts.detach().reshape(-1).long(), gain))
    return gain


def _times(values: Tensor, gain: Tensor) -> Tensor:
    """Values times gains, in the type of the values."""
    return (values.float() * gain).to(values.dtype)


def _on_weights(layer: MoeLayer, slots: Slots) -> list[RemovableHandle]:
    """Gains on the weights that a container is called with."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = Call.read(args, kwargs)
        gain = _ones(slots, call.ids, call.weights.shape)
        changed = call.with_values(None, None, _times(call.weights, gain))
        return changed.args, changed.kwargs

    return [layer.experts.register_forward_pre_hook(hook, with_kwargs=True)]


def _on_rows(layer: MoeLayer, slots: Slots) -> list[RemovableHandle]:
    """Gains on what every expert makes of every token (Llama 4)."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        rows = output.reshape(layer.n_experts, -1, output.shape[-1])
        experts = torch.arange(layer.n_experts, device=rows.device)[:, None]
        gain = _ones(slots, experts.expand(rows.shape[:2]), (*rows.shape[:2], 1))
        return _times(rows, gain).reshape(output.shape)

    return [layer.experts.register_forward_hook(hook)]


def _on_gates(layer: MoeLayer, slots: Slots) -> list[RemovableHandle]:
    """Gains on the gates of rows sorted by expert (JetMoE)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401
        order, token, gates, sizes, logits = output
        counts = torch.tensor(sizes, device=gates.device)
        experts = torch.arange(len(sizes), device=gates.device).repeat_interleave(counts)
        return order, token, _times(gates, _ones(slots, experts, gates.shape)), sizes, logits

    return [layer.router.register_forward_hook(hook)]


def _on_modules(layer: MoeLayer, slots: Slots) -> list[RemovableHandle]:
    """Gains on what each expert returns, where every one is a module."""

    def hook(number: int, _module: nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401
        rows = output if isinstance(output, Tensor) else output[0]
        shape = (*rows.shape[:-1], 1)
        experts = torch.full(shape, number, device=rows.device)
        changed = _times(rows, _ones(slots, experts, shape))
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    experts = enumerate(layer.experts.children())
    return [expert.register_forward_hook(partial(hook, number)) for number, expert in experts]


_ATTACH: dict[str, Callable[[MoeLayer, Slots], list[RemovableHandle]]] = {
    "container": _on_weights,
    "expanded": _on_weights,
    "scaled_input": _on_rows,
    "sorted": _on_gates,
    "modules": _on_modules,
}
"""Where gains go, by the way in which a layer's experts are listened to."""
