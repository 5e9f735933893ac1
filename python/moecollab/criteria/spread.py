"""How far scores would vary with other documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import ShapeError

ARRAYS = ("standard_error", "low", "high", "kept_probability")


@dataclass(frozen=True, eq=False, kw_only=True)
class Spread:
    """What a bootstrap says of scores; arrays have shape (n_layers, n_experts).

    Parameters
    ----------
    standard_error : float64 array
        Standard deviation of each score over the resamples.
    low, high : float64 array
        Ends of the interval that holds the middle of the resampled scores.
    kept_probability : float64 array
        Part of the resamples in which each expert stays under the budget, in [0, 1].
    stability : float
        Jaccard index of the experts that two resamples keep, mean over layers and over pairs: how
        alike the kept sets of two recordings of this size would be.
    budget : mapping
        The budget that experts stay under, as :meth:`moecollab.pruning.budgets.Budget.as_json`.
    settings : mapping
        Resamples, folds, seed and confidence.
    """

    standard_error: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    kept_probability: NDArray[np.float64]
    stability: float
    budget: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the arrays are alike."""
        for name in ARRAYS:
            value = getattr(self, name)
            if value.dtype != np.float64 or value.shape != self.standard_error.shape:
                raise ShapeError(
                    f"{name} of the spread is {value.dtype} {value.shape}, expected float64 "
                    f"{self.standard_error.shape}; resample again"
                )

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def about(self) -> dict[str, Any]:
        """All but the arrays, as plain data."""
        return {
            "stability": self.stability,
            "budget": dict(self.budget),
            "settings": dict(self.settings),
        }
