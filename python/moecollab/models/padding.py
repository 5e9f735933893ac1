"""Experts that only fill up a layer: their router adds a bias with which no token chooses them."""

from __future__ import annotations

from collections.abc import Sequence

from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import router_rows

NEVER = -30_000.0
"""Bias of an expert that is not to be chosen: finite in float16, and far below any score."""

BIASES = ("bias", "e_score_correction_bias", "expert_bias")
"""Names of what routers add to choose by."""


def barred(layers: Sequence[MoeLayer]) -> dict[int, tuple[int, ...]]:
    """Experts by layer that the biases of a loaded model keep from being chosen."""
    found = {}
    for layer in layers:
        for _, name, value in router_rows(layer):
            if name in BIASES and not value.is_meta:
                low = value.detach().flatten() < NEVER / 2  # types may round it
                found[layer.layer] = tuple(low.nonzero().flatten().tolist())
    return found
