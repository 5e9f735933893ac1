"""What the parameters of one layer's experts say, expert by expert."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.models.routing import MoeLayer
from moecollab.models.weights import expert_matrices, router_matrix

STEPS = 32
"""Lanczos steps for a largest singular value; exact for matrices of no larger rank."""


def entry_sums(layer: MoeLayer) -> NDArray[np.float64]:
    """Σ|w|, Σw² and the number of entries of every expert's matrices: (n_experts, 3)."""
    return np.array([_entry_sums(own) for own in expert_matrices(layer)], np.float64)


def _entry_sums(matrices: list[Tensor]) -> list[float]:
    held = [matrix.float() for matrix in matrices]
    absolute = sum(float(matrix.abs().sum(dtype=torch.float64)) for matrix in held)
    squares = sum(float(matrix.square().sum(dtype=torch.float64)) for matrix in held)
    return [absolute, squares, sum(matrix.numel() for matrix in held)]


def router_norms(layer: MoeLayer) -> NDArray[np.float64]:
    """Euclidean norm of every expert's row of the router: (n_experts,)."""
    norms: Tensor = torch.linalg.vector_norm(router_matrix(layer).double(), dim=1)
    return np.array(norms.tolist(), np.float64)


def stable_ranks(layer: MoeLayer) -> NDArray[np.float64]:
    """Mean of Σσ² / σ₁² over every expert's matrices, as they are stored: (n_experts,)."""
    found = [[_stable_rank(one.float()) for one in own] for own in expert_matrices(layer)]
    mean: NDArray[np.float64] = np.array(found, np.float64).mean(axis=1)
    return mean


def _stable_rank(matrix: Tensor) -> float:
    total = float(matrix.square().sum(dtype=torch.float64))
    return total / largest_singular(matrix) ** 2 if total > 0 else 0.0


def largest_singular(matrix: Tensor) -> float:
    """Largest singular value of a float32 matrix, by Lanczos steps on MᵀM.

    Golub and Van Loan, Matrix Computations, §10.1, with the basis made orthogonal anew at every
    step. The start is fixed, so the result is too; it is never above the true value but by
    rounding, and within 2e-4 of it on random matrices of 2,048 rows and columns.
    """
    wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    steps = min(STEPS, wide.shape[1])
    draw = torch.Generator().manual_seed(0)
    vector = torch.randn(wide.shape[1], generator=draw).to(wide.device)
    basis = (vector / torch.linalg.vector_norm(vector))[None]
    reduced = torch.zeros(steps, steps, dtype=torch.float64)
    for step in range(steps):
        image = wide.T @ (wide @ basis[step])
        reduced[step, : step + 1] = (basis @ image).double().cpu()
        for _ in range(2):  # once is not enough in float32
            image = image - basis.T @ (basis @ image)
        length = torch.linalg.vector_norm(image)
        if step + 1 == steps or float(length) <= 1e-6 * float(reduced[step, step].abs()):
            reduced = reduced[: step + 1, : step + 1]
            break
        basis = torch.cat([basis, (image / length)[None]])
    return float(torch.linalg.eigvalsh(reduced)[-1].clamp(min=0).sqrt())


def cosine_sums(layer: MoeLayer) -> NDArray[np.float64]:
    """Σ over the other experts of the cosine between all entries of two: (n_experts,)."""
    return matrix_cosines(expert_matrices(layer))


def matrix_cosines(experts: list[list[Tensor]]) -> NDArray[np.float64]:
    """The same of any matrices, by expert: (n_experts,)."""
    total = sum(_direction(own) for own in experts)
    found = [float((_direction(own) * total).sum(dtype=torch.float64)) for own in experts]
    own = [float(_direction(own).square().sum(dtype=torch.float64)) for own in experts]
    return np.array(found, np.float64) - np.array(own, np.float64)


def _direction(matrices: list[Tensor]) -> Tensor:
    """All entries of an expert as one vector of length 1, or of 0 if all are 0."""
    flat = torch.cat([matrix.reshape(-1).float() for matrix in matrices])
    length: Tensor = torch.linalg.vector_norm(flat).clamp(min=torch.finfo(torch.float32).tiny)
    return flat / length
