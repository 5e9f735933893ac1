"""Adding up what one shard recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moecollab.record.recorder import Routing
from moecollab.record.tallies import SUMS, Tallies


def tally(
    domains: Sequence[str],
    domain_of: NDArray[np.int64],
    layers: Sequence[Routing],
    n_experts: int,
) -> Tallies:
    """Sums over some tokens, added in the order of the tokens.

    Parameters
    ----------
    domains : sequence of str
        Names of all domains.
    domain_of : int64 array of shape (n_tokens,)
        Position in `domains` of each token's domain.
    layers : sequence of Routing
        What each MoE layer did to these tokens.
    n_experts : int
        Routed experts per layer.
    """
    norms = layers[0].norm is not None
    total = Tallies.zeros(domains, len(layers), n_experts, has_norms=norms)
    shape = (len(domains), n_experts)
    for row, layer in enumerate(layers):
        used = layer.weight != 0
        site = (domain_of[:, None] * n_experts + layer.expert)[used]  # (n_used,)
        weight = layer.weight[used].astype(np.float64)
        values = {"sum_weight": weight, "sum_weight_sq": weight * weight}
        if layer.norm is not None and layer.peak is not None:
            norm = layer.norm[used].astype(np.float64)
            values["sum_norm"], values["sum_norm_sq"] = norm, norm * norm
            values["sum_weighted_norm"] = weight * norm
            peak = np.zeros(total.max_abs[:, row].size)
            np.maximum.at(peak, site, layer.peak[used].astype(np.float64))
            total.max_abs[:, row] = peak.reshape(shape)
        size = len(domains) * n_experts
        total.count[:, row] = np.bincount(site, minlength=size).reshape(shape)
        for name in SUMS:
            if name in values:
                summed = np.bincount(site, values[name], size)
                getattr(total, name)[:, row] = summed.reshape(shape)
    return total
