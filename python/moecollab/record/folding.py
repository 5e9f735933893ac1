"""Folds of documents while they are recorded: sums by fold and domain at once, then by either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moecollab.record.sums import add
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
        replace(sample, document=replace(one, domain=cell_name(fold, one.domain)))
        for fold, sample in zip(folds, samples, strict=True)
        for one in [sample.document]
    ]


def cell_name(fold: int, domain: str) -> str:
    """Name of the documents of one fold and domain, in the place of a domain's."""
    return f"{fold:06d}{_BETWEEN}{domain}"


def cell_parts(cell: str) -> tuple[int, str]:
    """Fold and domain of a name that :func:`cell_name` made."""
    fold, _, domain = cell.partition(_BETWEEN)
    return int(fold), domain


def out_of_folds(cells: Tallies) -> tuple[Tallies, Tallies]:
    """Sums by domain, and by fold, of sums by both; folds are named by their number."""
    named = [cell_parts(cell) for cell in cells.domains]
    domains = [domain for _, domain in named]
    folds = [str(fold) for fold, _ in named]
    return (
        _grouped(cells, domains, sorted(set(domains))),
        _grouped(cells, folds, sorted(set(folds), key=int)),
    )


def _grouped(cells: Tallies, names: Sequence[str], order: Sequence[str]) -> Tallies:
    """Sums over the cells of each name, in the order of the names; of one cell each, its own."""
    if list(names) == list(order):
        return Tallies(tuple(order), cells.arrays)
    found = {
        key: np.zeros((len(order), *value.shape[1:]), value.dtype)
        for key, value in cells.arrays.items()
    }
    for cell, name in enumerate(names):
        row = order.index(name)
        add(
            {key: value[row] for key, value in found.items()},
            {key: value[cell] for key, value in cells.arrays.items()},
        )
    return Tallies(tuple(order), found)
