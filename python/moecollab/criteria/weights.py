"""Criteria that read parameters alone: no text is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.errors import MissingInputError

if TYPE_CHECKING:
    from moecollab.models.weights import Statistic


def aimer(evidence: Evidence, /) -> NDArray[np.float64]:
    """How unevenly sizes are spread over an expert's weights, few of them large.

    Formula: s(l, e) = -mean|w| / √(mean w²) over all entries of the expert's matrices
    Needs: weights
    Direction: higher is kept; the published ratio drops the largest first, so it is negated
    Cost: reads the experts' parameters once
    Source: AIMER, Liu et al. 2026 (arXiv:2603.18492)
    Not defined when: all weights of an expert are 0; it scores -1, the least there is
    """
    from moecollab.models.weight_statistics import entry_sums

    absolute, squares, n_entries = np.moveaxis(_each(evidence, entry_sums), -1, 0)
    ratio: NDArray[np.float64] = np.ones(absolute.shape)
    np.divide(absolute, np.sqrt(squares * n_entries), out=ratio, where=squares > 0)
    return -ratio


def weight_norm(evidence: Evidence, /) -> NDArray[np.float64]:
    """Euclidean norm of all weights of each expert.

    Formula: s(l, e) = √(Σ w²) over all entries of the expert's matrices
    Needs: weights
    Direction: higher is kept
    Cost: reads the experts' parameters once
    Source: EWN of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions
    Not defined when: never
    """
    from moecollab.models.weight_statistics import entry_sums

    norm: NDArray[np.float64] = np.sqrt(_each(evidence, entry_sums)[..., 1])
    return norm


def router_norm(evidence: Evidence, /) -> NDArray[np.float64]:
    """Euclidean norm of each expert's row of the router, negated.

    Formula: s(l, e) = -‖w(l, e)‖₂, w the router's row of expert e
    Needs: weights
    Direction: higher is kept; the largest norm goes first, so it is negated
    Cost: reads the routers' parameters once
    Source: RWN of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which found this direction the
        best of all that read weights
    Not defined when: never
    """
    from moecollab.models.weight_statistics import router_norms

    return -_each(evidence, router_norms)


def stable_rank(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean stable rank of each expert's matrices, negated.

    Formula: s(l, e) = -mean over the expert's matrices of Σ_i σ_i² / σ_1²
    Needs: weights
    Direction: higher is kept; dominant experts have low ranks, so the rank is negated
    Cost: reads the experts' parameters 64 times, a layer at a time
    Source: WSR of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions;
        matrices are those that the model stores, often gate and up as one
    Not defined when: a matrix is 0; its stable rank counts 0
    """
    from moecollab.models.weight_statistics import stable_ranks

    return -_each(evidence, stable_ranks)


def ews(evidence: Evidence, /) -> NDArray[np.float64]:
    """How much each expert's weights differ from those of its layer's others.

    Formula: s(l, e) = -Σ_{e' ≠ e} cos(w(l, e), w(l, e')), w all entries of an expert's matrices
    Needs: weights
    Direction: higher is kept; the most similar goes first, so the sum is negated
    Cost: reads the experts' parameters three times, a layer at a time
    Source: EWS of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions
    Not defined when: all weights of an expert are 0; its cosines count 0
    """
    from moecollab.models.weight_statistics import cosine_sums

    return -_each(evidence, cosine_sums)


def _each(evidence: Evidence, statistic: Statistic) -> NDArray[np.float64]:
    """A statistic of every layer's experts."""
    if evidence.weights is None:
        raise MissingInputError("parameters are needed; pass the model: model= (--model)")
    return evidence.weights.each(statistic)


CRITERIA = (
    Criterion("aimer", Needs.WEIGHTS, aimer),
    Criterion("weight_norm", Needs.WEIGHTS, weight_norm),
    Criterion("router_norm", Needs.WEIGHTS, router_norm),
    Criterion("stable_rank", Needs.WEIGHTS, stable_rank),
    Criterion("ews", Needs.WEIGHTS, ews),
)
