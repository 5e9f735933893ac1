"""Slow, obvious twins of the core's kernels, in numpy."""

import math

import numpy as np


def objective(x, atoms, codes, sparsity, reconstruction, usage=None):
    """The three terms without weights, and the total; `atoms` and `codes` are lists by level.

    `usage` fixes the usage weights of the rows of each level; by default they are the codes' own.
    """
    size = small = error = 0.0
    target, u, n = x.astype(np.float64), np.ones(len(x)), len(x)
    for level, (d, r) in enumerate(zip(atoms, codes, strict=True)):
        d, r = d.astype(np.float64), r.astype(np.float64)
        u = u if usage is None else usage[level]
        size += r.max(axis=0).sum()
        small += (u * r.sum(axis=1)).sum() / n
        error += (u * np.abs(target - r @ d).sum(axis=1)).sum() / n
        target, u, n = d, r.sum(axis=0), len(r)
    return size, small, error, size + sparsity * small + reconstruction * error


def best_code(row, atoms, code, atom, ratio, cap):
    """The best value of one code by trying every breakpoint."""
    rest = row - code @ atoms + code[atom] * atoms[atom]
    points = [rest[e] / atoms[atom][e] for e in np.flatnonzero(atoms[atom])]
    tries = [0.0, cap, *(min(max(point, 0.0), cap) for point in points)]
    return min(tries, key=lambda r: ratio * r + np.abs(rest - r * atoms[atom]).sum())


def best_entry(column, codes, entries, atom):
    """The best value of one dictionary entry in [0, 1] by trying every breakpoint."""
    rest = column - codes @ entries + codes[:, atom] * entries[atom]
    used = codes[:, atom] > 0
    points = np.clip(rest[used] / codes[used, atom], 0.0, 1.0)
    tries = [0.0, 1.0, *points]
    return min(tries, key=lambda d: np.abs(rest - d * codes[:, atom]).sum())


def best_atom_codes(x, atoms, codes, atom, sparsity, reconstruction):
    """Objective after the best joint choice of one atom's codes and their maximum, by grid."""
    best = math.inf
    for cap in np.unique(np.concatenate(([0.0], x.ravel()))):
        trial = codes.copy()
        for i in range(len(x)):
            ratio = sparsity / reconstruction
            trial[i, atom] = best_code(x[i], atoms, codes[i], atom, ratio, cap)
        best = min(best, objective(x, [atoms], [trial], sparsity, reconstruction)[3])
    return best


def caep(atoms, usage, peak, fraction):
    """CAEP's loop, run until all atoms are gone: step of the fall and contribution before it."""
    alive = (peak > 0) & (peak >= 0.05 * peak.max(initial=0))
    e = (atoms * (usage * alive)[:, None]).sum(axis=0)
    threshold = np.sort(e)[::-1][math.ceil(fraction * len(e)) - 1]
    steps, contribution = np.full(len(e), alive.sum() + 1), e.copy()
    for step in range(alive.sum() + 1):
        now = (atoms * (usage * alive)[:, None]).sum(axis=0)
        falls = (now < threshold) & (steps > step)
        steps[falls], contribution[falls] = step, e[falls]
        e = now
        if alive.any():
            alive[np.flatnonzero(alive)[usage[alive].argmin()]] = False
    return steps, contribution
