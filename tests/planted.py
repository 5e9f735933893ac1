"""Rows made of known groups of experts."""

import numpy as np

from moecollab.record.rows import Rows

SHORT_FIT = {
    "atoms": [8],
    "copies": False,
    "dictionary_size": 1.0,
    "sparsity": 1.0,
    "reconstruction": 100.0,
    "max_iterations": 5,
    "tolerance": 1e-3,
    "seed": 0,
    "threads": 1,
}
"""Settings of a short fit, as the Rust core takes them."""


def planted(n_rows=400, n_layers=6, n_experts=16, n_groups=24, *, noise=0.0, seed=0):
    """Rows of one to three groups each, groups of two to five experts in different layers.

    Returns the dense rows (n_rows, n_sites) and the groups as 0/1 rows.
    """
    rng = np.random.default_rng(seed)
    groups = np.zeros((n_groups, n_layers * n_experts), np.float32)
    for group in groups:
        layers = rng.choice(n_layers, rng.integers(2, min(6, n_layers + 1)), replace=False)
        group[layers * n_experts + rng.integers(0, n_experts, len(layers))] = 1
    x = np.zeros((n_rows, groups.shape[1]), np.float32)
    for row in x:
        for group in rng.choice(n_groups, rng.integers(1, 4), replace=False):
            row += groups[group] * np.float32(rng.uniform(0.5, 1.0))
    stray = rng.random(x.shape) < noise
    x[stray] += rng.uniform(0.05, 0.3, stray.sum()).astype(np.float32)
    return x, groups


def as_rows(x):
    """Dense rows as sparse ones."""
    return Rows.of(np.asarray(x, np.float32))


def dense_codes(codes, n_atoms):
    """Sparse codes as an array of shape (n_rows, n_atoms)."""
    out = np.zeros((codes.n_rows, n_atoms), np.float32)
    out[np.repeat(np.arange(codes.n_rows), np.diff(codes.indptr)), codes.atom] = codes.value
    return out


def found_share(atoms, groups):
    """Fraction of groups whose members are exactly those of an atom at threshold 0.5."""
    sets = {tuple(np.flatnonzero(atom >= 0.5)) for atom in atoms}
    return np.mean([tuple(np.flatnonzero(group)) in sets for group in groups])


def planted_levels(n_rows=600, *, noise=0.0, seed=0):
    """Rows of one or two of 24 coarse groups, each of which is two of 12 fine groups of four.

    Every fine group is in four coarse ones. Returns the dense rows (n_rows, 96), the coarse and
    the fine groups as 0/1 rows.
    """
    rng = np.random.default_rng(seed)
    fine = np.zeros((12, 96), np.float32)
    fine[np.repeat(np.arange(12), 4), rng.permutation(96)[:48]] = 1
    coarse = np.concatenate([fine + np.roll(fine, -step, axis=0) for step in (1, 5)])
    x = np.zeros((n_rows, 96), np.float32)
    for row in x:
        for group in rng.choice(24, rng.integers(1, 3), replace=False):
            row += coarse[group] * np.float32(rng.uniform(0.5, 1.0))
    stray = rng.random(x.shape) < noise
    x[stray] += rng.uniform(0.05, 0.3, stray.sum()).astype(np.float32)
    return x, coarse, fine
