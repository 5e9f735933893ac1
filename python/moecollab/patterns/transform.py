"""Codes of new rows on the atoms of a collaboration."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moecollab.errors import SettingsError
from moecollab.patterns.codes import Codes
from moecollab.patterns.engines import code_block
from moecollab.progress import track
from moecollab.record.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecollab.patterns.collaboration import Collaboration
    from moecollab.record.activations import Activations

BLOCK = 8192
"""Rows that are coded between two looks at the keyboard."""
DENSE = 2048
"""Rows that are made dense at once."""


def encode(
    collab: Collaboration, acts: Activations | Rows, level: int, threads: int | None
) -> Codes:
    """Codes of rows at one level, found on the atoms of level 1 and passed on through the links."""
    rows = acts if isinstance(acts, Rows) else _rows(collab, acts)
    if rows.n_sites != collab.n_sites:
        raise SettingsError("rows", f"{rows.n_sites} sites", f"{collab.n_sites} sites, as fitted")
    edges = [*range(0, max(1, rows.n_rows), BLOCK), rows.n_rows]  # no rows: the core says so
    parts = []
    with track("transform", rows.n_rows) as bar:
        for start, stop in pairwise(edges):
            parts.append(_block(collab, rows, (start, stop), threads or 0))
            bar.advance(stop - start)
    codes = Codes.join(parts)
    for finer in collab.levels[1:level]:
        if finer.links is not None:
            codes = codes.through(finer.links)
    return codes


def _rows(collab: Collaboration, acts: Activations) -> Rows:
    """Rows as they were fitted, of a model of the same shape."""
    if (acts.layers, acts.n_experts) != (collab.layers, collab.n_experts):
        got = f"{acts.n_layers} layers of {acts.n_experts} experts"
        wanted = f"the {len(collab.layers)} layers of {collab.n_experts} experts that were fitted"
        raise SettingsError("acts", got, wanted)
    return acts.rows(collab.settings["rows"], collab.settings["weights"])


def _block(collab: Collaboration, rows: Rows, span: tuple[int, int], threads: int) -> Codes:
    start, stop = span
    pointers = rows.indptr[start : stop + 1]
    inside = slice(pointers[0], pointers[-1])
    block = Rows(
        pointers - pointers[0],
        rows.sites[inside],
        rows.values[inside],
        rows.sample[start:stop],
        rows.n_sites,
    )
    return code_block(block, collab.levels[0], collab.settings, threads)


def absolute_error(
    atoms: NDArray[np.float32],
    rows: Rows,
    codes: Codes,
    weight: NDArray[np.float64] | None = None,
) -> float:
    """Sum over rows and sites of the absolute difference between rows and codes times atoms."""
    matrix, error = codes.matrix(len(atoms)), 0.0
    for start in range(0, rows.n_rows, DENSE):
        block = np.arange(start, min(start + DENSE, rows.n_rows))
        rest = rows.take(block).dense() - matrix[block] @ atoms
        each = np.abs(rest, out=rest).sum(axis=1, dtype=np.float64)
        error += float(each.sum() if weight is None else weight[block] @ each)
    return error
