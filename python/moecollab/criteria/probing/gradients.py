"""Gradients of the next-token loss by the experts' weights, added up over a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.criteria.base import Evidence
from moecollab.criteria.channels import SMALLEST
from moecollab.criteria.probing.probing import (
    Model,
    Windows,
    differentiable,
    finite,
    inputs_of,
    logits_in,
    losses_of,
    subject,
)
from moecollab.models.routing import MoeLayer
from moecollab.models.weights import expert_matrices
from moecollab.progress import track

HELD = 1 << 32
"""Bytes of gradients that are held at once, of one layer at least."""

Experts: TypeAlias = list[list[Tensor]]
"""A matrix of each kind for each expert of a layer."""

_FAR = 3.0  # standard deviations


def of_gradients(
    evidence: Evidence, statistic: Callable[[Experts], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """A statistic of the gradients of each layer's experts: (n_layers, n_experts)."""
    model, layers, windows = subject(evidence)
    parts = list(_parts(layers))
    found: list[NDArray[np.float64]] = []
    with track("differentiating", len(parts) * len(windows)) as bar:
        for part in parts:
            wanted = [one for layer in part for one in _matrices(layer)]
            read = _read(_sums(model, wanted, windows, bar.advance))
            found += [statistic(expert_matrices(layer, read)) for layer in part]
    return evidence.stacked(found)


def _read(sums: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """Gives what belongs to a parameter."""
    return lambda parameter: sums[id(parameter)]


def _parts(layers: Sequence[MoeLayer]) -> Iterator[list[MoeLayer]]:
    """Layers whose gradients fit into what may be held, and at least one."""
    part: list[MoeLayer] = []
    total = 0
    for layer in layers:
        size = sum(one.numel() * (4 + one.dtype.itemsize) for one in _matrices(layer))
        if part and total + size > HELD:
            yield part
            part, total = [], 0
        part.append(layer)
        total += size
    yield part


def _matrices(layer: MoeLayer) -> list[nn.Parameter]:
    """The parameters that hold the matrices of a layer's experts."""
    held: dict[int, Tensor] = {}

    def read(value: Tensor) -> Tensor:
        held[id(value)] = value
        return value.detach()

    expert_matrices(layer, read)
    return [one for one in held.values() if isinstance(one, nn.Parameter)]


def _sums(
    model: Model, wanted: list[nn.Parameter], windows: Windows, advance: Callable[[], None]
) -> dict[int, Tensor]:
    """Gradients of the loss in nats, summed over all tokens, in float32, by the parameter's id."""
    sums = {id(one): torch.zeros_like(one, dtype=torch.float32) for one in wanted}
    with differentiable(model, wanted):
        for number, window in enumerate(windows):
            if len(window) > 1:
                logits = logits_in(model, model(**inputs_of(model, window)))
                loss = finite(losses_of(logits, window), f"window {number} of the text").sum()
                slopes = torch.autograd.grad(loss, wanted, allow_unused=True)
                for one, slope in zip(wanted, slopes, strict=True):
                    if slope is not None:
                        sums[id(one)] += slope
            advance()
    return sums


def channel_norms(experts: Experts) -> NDArray[np.float64]:
    """Σ_c ‖G_c‖₂ over the columns of each expert's matrices: (n_experts,)."""
    return _each(experts, lambda matrix: torch.linalg.vector_norm(matrix, dim=0).sum())


def log_spreads(experts: Experts) -> NDArray[np.float64]:
    """Σ_c log σ_c over the columns of each expert's matrices, σ ≥ 1e-12: (n_experts,)."""

    def spread(matrix: Tensor) -> Tensor:
        return matrix.std(dim=0, correction=0).clamp(min=SMALLEST).log().sum()

    return _each(experts, spread)


def far_entries(experts: Experts) -> NDArray[np.float64]:
    """Entries further than 3 standard deviations from their column's mean: (n_experts,)."""

    def far(matrix: Tensor) -> Tensor:
        spread, mean = torch.std_mean(matrix, dim=0, correction=0)
        return ((matrix - mean).abs() > _FAR * spread).sum()

    return _each(experts, far)


def _each(experts: Experts, statistic: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    """A statistic of every matrix in float64, added up by expert: (n_experts,)."""
    found = [sum(float(statistic(matrix.double())) for matrix in own) for own in experts]
    return np.array(found, np.float64)
