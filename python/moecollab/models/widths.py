"""How many experts every layer has, where layers differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def counts_from_json(value: Any, n_layers: int) -> tuple[int, ...] | None:  # noqa: ANN401
    """Experts of every layer in plain data, None where all are alike; ValueError if too many."""
    if value is None:
        return None
    found = tuple(map(int, value))
    if len(found) != n_layers:
        raise ValueError(f"{len(found)} numbers for {n_layers} layers")
    return found


def present(counts: Sequence[int], n_experts: int) -> NDArray[np.bool_]:
    """Which sites are experts, given those of every layer: (n_layers, n_experts).

    Examples
    --------
    >>> present((2, 3), 3).tolist()
    [[True, True, False], [True, True, True]]
    """
    held: NDArray[np.bool_] = np.arange(n_experts) < np.asarray(counts)[:, None]
    return held
