"""Routing with structure, made up from token ids and context."""

import numpy as np


def routed(n, n_layers, n_experts, top_k, *, kinds=50, context=1.0, seed=0):
    """Active experts of tokens of some ids in some contexts, and the ids.

    Returns bool (n, n_layers * n_experts) and uint32 (n,).
    """
    rng = np.random.default_rng(seed)
    token = rng.zipf(1.3, n).clip(max=kinds).astype(np.uint32)
    logits = rng.normal(0, 1.5, (kinds + 1, n_layers, n_experts))[token]
    mixing = rng.normal(0, 0.8, (n_layers, 4, n_experts))
    logits += context * np.einsum("nf,lfe->nle", rng.normal(0, 1, (n, 4)), mixing)
    logits += rng.gumbel(size=logits.shape)
    return as_matrix(np.argsort(-logits, axis=2)[:, :, :top_k], n_experts), token


def as_matrix(ids, n_experts):
    """Expert ids (n, n_layers, top_k) as a bool matrix over all sites."""
    n, n_layers, _ = ids.shape
    x = np.zeros((n, n_layers * n_experts), bool)
    x[np.arange(n)[:, None, None], ids + np.arange(n_layers)[:, None] * n_experts] = True
    return x


def swapped(x, strata, n_experts, rng, sweeps=8):
    """Each layer's table drawn anew with its row and column sums kept within strata.

    Pairs of rows deal what they do not share anew (Strona et al. 2014, "curveball").
    """
    x = x.copy()
    groups = [np.flatnonzero(strata == one) for one in np.unique(strata)]
    for layer in range(x.shape[1] // n_experts):
        own = x[:, layer * n_experts : (layer + 1) * n_experts]
        for group in groups * sweeps:
            order = rng.permutation(group)
            for one, two in zip(order[::2], order[1::2], strict=False):
                differ = np.flatnonzero(own[one] != own[two])
                dealt = rng.permutation(own[one, differ])
                own[one, differ], own[two, differ] = dealt, ~dealt
    return x
