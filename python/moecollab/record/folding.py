"""Folds of documents while they are recorded: sums by fold and domain at once, then by either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moecollab.record.sums import add, total
from moecollab.record.tallies import Tallies
from moecollab.record.windows import Sample

_BETWEEN = "\0"
"""What is in no domain's name."""


def folds_of(n_samples: int, n_folds: int, *, seed: int = 0) -> NDArray[np.int64]:
    """A fold for each document, at random, as many documents in each as can be.

    Returns
    -------
    int64 array of shape (n_samples,)
        Numbers in [0, n_folds).
    """
    found = np.empty(n_samples, dtype=np.int64)
    found[np.random.default_rng(seed).permutation(n_samples)] = np.arange(n_samples) % n_folds
    return found


def in_folds(samples: Sequence[Sample], n_folds: int, *, seed: int) -> list[Sample]:
    """The samples with fold and domain together in the place of the domain."""
    folds = folds_of(len(samples), n_folds, seed=seed).tolist()
    return [
        replace(sample, document=replace(one, domain=f"{fold:06d}{_BETWEEN}{one.domain}"))
        for fold, sample in zip(folds, samples, strict=True)
        for one in [sample.document]
    ]


def out_of_folds(cells: Tallies) -> tuple[Tallies, Tallies]:
    """Sums by domain, and by fold, of sums by both; folds are named by their number.

    Sums by fold are made in the place of the cells, which are used up: large sums are held once.

    Parameters
    ----------
    cells : Tallies
        Sums of the samples of :func:`in_folds`, in the order of their names.
    """
    folds, domains = zip(*(cell.split(_BETWEEN, 1) for cell in cells.domains), strict=True)
    return _by_domain(cells, domains), _by_fold(cells, folds)


def _by_domain(cells: Tallies, domains: Sequence[str]) -> Tallies:
    """Sums over the cells of each domain, in new arrays."""
    names = sorted(set(domains))
    found = {
        key: np.zeros((len(names), *value.shape[1:]), value.dtype)
        for key, value in cells.arrays.items()
    }
    for cell, domain in enumerate(domains):
        row = names.index(domain)
        add(
            {key: value[row] for key, value in found.items()},
            {key: value[cell] for key, value in cells.arrays.items()},
        )
    return Tallies(tuple(names), found)


def _by_fold(cells: Tallies, folds: Sequence[str]) -> Tallies:
    """Sums over the cells of each fold, in their first rows: none is written before it is read."""
    names, starts = np.unique(folds, return_index=True)
    for row, own in enumerate(np.split(np.arange(len(folds)), starts[1:])):
        part = {key: value[own[0] : own[-1] + 1] for key, value in cells.arrays.items()}
        for key, value in total(part).items():
            cells.arrays[key][row] = value
    held = {key: value[: len(names)] for key, value in cells.arrays.items()}
    return Tallies(tuple(str(int(name)) for name in names), held)
