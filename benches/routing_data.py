"""Synthetic routing of sentences with planted patterns: data for the squared-error benches.

A pattern is a few experts in each layer of a band of layers; a theme is a few patterns. A sentence
draws one or two themes and some of their patterns; an entry is the share of its tokens that were
routed to one expert, so its noise is that of a short sentence.
"""

import numpy as np

TOKENS = 30
TOP_K = 6
BACKGROUND = 0.15


def routing(n_rows=2000, n_layers=26, n_experts=64, n_atoms=128, *, seed=0):
    """Rows float32 (n_rows, n_layers * n_experts) and their patterns, of norm 1."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(n_experts, 0.7), n_layers)
    patterns = np.stack([_pattern(rng, popularity) for _ in range(n_atoms)])
    codes = _codes(rng, n_rows, n_atoms)
    rates = codes @ patterns
    rates *= (1 - BACKGROUND) * TOP_K * n_layers / rates.sum(axis=1, keepdims=True)
    rates = np.minimum(rates + BACKGROUND * TOP_K * popularity.ravel(), 1.0)
    tokens = np.clip(rng.lognormal(np.log(TOKENS), 0.5, n_rows), 6, 200).astype(int)[:, None]
    return (rng.binomial(tokens, rates) / tokens).astype(np.float32), patterns.astype(np.float32)


def _pattern(rng, popularity):
    """Two to five experts in each layer of a band, popular ones more often."""
    n_layers, n_experts = popularity.shape
    width = int(rng.integers(max(2, 2 * n_layers // 5), 4 * n_layers // 5 + 1))
    first = int(rng.integers(0, n_layers - width + 1))
    pattern = np.zeros((n_layers, n_experts))
    for layer in range(first, first + width):
        odds = np.sqrt(popularity[layer] + 1e-4)
        size = min(int(rng.integers(2, 6)), n_experts)
        members = rng.choice(n_experts, size, replace=False, p=odds / odds.sum())
        pattern[layer, members] = rng.gamma(2.0, 0.5, size) + 0.2
    return pattern.ravel() / np.linalg.norm(pattern)


def _codes(rng, n_rows, n_atoms):
    """Codes of the patterns of one or two themes a row, and of a few strays."""
    n_themes = max(4, n_atoms // 8)
    themes = [rng.choice(n_atoms, min(11, n_atoms), replace=False) for _ in range(n_themes)]
    codes = np.zeros((n_rows, n_atoms))
    for row in codes:
        for theme in rng.choice(n_themes, int(rng.integers(1, 3)), replace=False):
            size = min(int(rng.integers(3, 7)), len(themes[theme]))
            used = rng.choice(themes[theme], size, replace=False)
            row[used] += rng.gamma(3.0, 1 / 3) * rng.gamma(4.0, 0.25, size)
        strays = rng.choice(n_atoms, int(rng.integers(0, 3)), replace=False)
        row[strays] += rng.gamma(2.0, 0.05)
    return codes
