"""Every expert of a layer on the same tokens, whether they chose it or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.criteria.base import Evidence
from moecollab.criteria.probing.probing import (
    FOREIGN,
    Model,
    Windows,
    inputs_of,
    not_finite,
    subject,
)
from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import Call, MoeLayer, text_config
from moecollab.progress import track

HELD = 1 << 28
"""Bytes of outputs that are held at once, of one token at least."""

INPUTS = 1 << 30
"""Bytes of experts' inputs that are held at once, of one layer at least."""

_FAR = 3.0  # standard deviations


class _Left(BaseException):
    """Ends a forward after the last layer that was wanted."""


class Everyone:
    """The experts of a layer and the tokens that reach it.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    """

    def __init__(self, layer: MoeLayer) -> None:
        if layer.layout.capture not in _RUN:
            raise UnsupportedModelError(
                f"the experts of {layer.name} run only where their router sends tokens, not on any "
                "token; use a criterion of another group"
            )
        self.layer = layer
        self.rows: list[Tensor] = []
        self.dim = 2

    @contextmanager
    def listening(self, *, leave: bool) -> Iterator[None]:
        """Keeps what the experts, or the block around them, are given."""
        container = self.layer.layout.container

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = Call.read(args, kwargs).hidden if container else _first(args, kwargs)
            self.rows.append(hidden.reshape(-1, hidden.shape[-1]).clone())
            self.dim = hidden.dim()
            if leave:
                raise _Left

        target = self.layer.experts if container else self.layer.block
        handle = target.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def outputs(self) -> Iterator[Tensor]:
        """Outputs of all experts before any weight, some tokens a time: (n_experts, n, hidden).

        Raises
        ------
        DataError
            When an output is not finite.
        """
        rows = torch.cat(self.rows)
        size = max(1, HELD // (self.layer.n_experts * rows.shape[1] * 8))
        for part in torch.split(rows, size):
            yield self.outputs_of(part)

    def outputs_of(self, rows: Tensor) -> Tensor:
        """Outputs of all experts on some tokens (n, hidden), before any weight, in float64.

        Raises
        ------
        DataError
            When an output is not finite.
        """
        shaped = rows.reshape(*[1] * (self.dim - 2), *rows.shape)
        found = _RUN[self.layer.layout.capture](self.layer, shaped)
        found = found.reshape(self.layer.n_experts, len(rows), -1).double()
        if not bool(found.isfinite().all()):
            raise not_finite(f"what the experts of {self.layer.name} return")
        return found


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))


def _called(layer: MoeLayer, rows: Tensor) -> Tensor:
    """Outputs of a container that honours ids and weights."""
    try:
        return _in_slots(layer, rows, [1.0])
    except FOREIGN:  # LongCat's cannot do with a single slot
        return _in_slots(layer, rows, [1.0, 0.0])


def _in_slots(layer: MoeLayer, rows: Tensor, weights: list[float]) -> Tensor:
    shape = rows.shape[:-1].numel(), len(weights)
    given = torch.tensor(weights, dtype=rows.dtype, device=rows.device).expand(shape)
    ids = torch.zeros(shape, dtype=torch.long, device=rows.device)
    found = [layer.experts(rows, ids + expert, given) for expert in range(layer.n_experts)]
    return torch.stack(found)


def _repeated(layer: MoeLayer, rows: Tensor) -> Tensor:
    """Outputs of a container that runs each expert on as many rows (Llama 4), at a gate of 1."""
    found: Tensor = layer.experts(rows.reshape(-1, rows.shape[-1]).repeat(layer.n_experts, 1))
    return found


def _one_by_one(layer: MoeLayer, rows: Tensor) -> Tensor:
    """Outputs of experts that are modules."""
    found = [expert(rows) for expert in layer.experts.children()]
    return torch.stack([one if isinstance(one, Tensor) else one[0] for one in found])


_RUN: dict[str, Callable[[MoeLayer, Tensor], Tensor]] = {
    "container": _called,
    "expanded": _called,
    "scaled_input": _repeated,
    "modules": _one_by_one,
}


def everyone(model: Model, layers: Sequence[MoeLayer], windows: Windows) -> Iterator[Everyone]:
    """The experts of each layer with the tokens of all windows."""
    width = int(text_config(model).hidden_size) * int(model.dtype.itemsize)
    size = max(1, INPUTS // (width * sum(map(len, windows))))
    for start in range(0, len(layers), size):
        part = [Everyone(layer) for layer in layers[start : start + size]]
        with ExitStack() as stack:
            for one in part:
                stack.enter_context(one.listening(leave=one is part[-1]))
            for window in windows:
                with suppress(_Left):
                    model(**inputs_of(model, window))
        yield from part


def output_cosines(evidence: Evidence) -> NDArray[np.float64]:
    """Σ_{e' ≠ e} of the mean over tokens of cos(f_e, f_e'): (n_layers, n_experts)."""

    def sums(one: Everyone) -> Tensor:
        return sum((_cosines(part) for part in one.outputs()), torch.zeros(one.layer.n_experts))

    return _by_layer(evidence, sums) / sum(map(len, evidence.probe))


def _cosines(outputs: Tensor) -> Tensor:
    """Σ_t Σ_{e' ≠ e} cos(f_e(t), f_e'(t)) of outputs (n_experts, n, hidden): (n_experts,)."""
    unit = torch.nn.functional.normalize(outputs, dim=-1, eps=1e-300)
    others = unit.sum(dim=0) - unit
    return (unit * others).sum(dim=(1, 2)).cpu()


def far_outputs(evidence: Evidence) -> NDArray[np.float64]:
    """Entries further than 3 standard deviations from their channel's mean, of all tokens."""

    def count(one: Everyone) -> Tensor:
        n_tokens = sum(map(len, one.rows))
        mean = torch.stack([part.sum(dim=1) for part in one.outputs()]).sum(dim=0) / n_tokens
        around = [((part - mean[:, None]) ** 2).sum(dim=1) for part in one.outputs()]
        spread = (torch.stack(around).sum(dim=0) / n_tokens).sqrt()
        far = [_far(part, mean, spread) for part in one.outputs()]
        return torch.stack(far).sum(dim=0).cpu()

    return _by_layer(evidence, count)


def _far(outputs: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    off = (outputs - mean[:, None]).abs()
    return (off > _FAR * spread[:, None]).sum(dim=(1, 2))


def _by_layer(evidence: Evidence, statistic: Callable[[Everyone], Tensor]) -> NDArray[np.float64]:
    """A statistic of each layer's experts on the tokens of the probe: (n_layers, n_experts)."""
    model, layers, windows = subject(evidence)
    found = []
    with torch.inference_mode(), track("running every expert", len(layers)) as bar:
        for one in everyone(model, layers, windows):
            found.append(statistic(one).double().numpy())
            bar.advance()
    return evidence.stacked(found)
