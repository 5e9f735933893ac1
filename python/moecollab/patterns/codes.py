"""Codes: how rows are written in atoms, as compressed sparse rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecollab.record.rows import Matrix

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, eq=False)
class Codes:
    """How every row is written in atoms of one level: compressed sparse rows, ascending by atom.

    Parameters
    ----------
    indptr : int64 array of shape (n_rows + 1,)
        Row `i` owns entries ``indptr[i]:indptr[i + 1]``.
    atom : uint32 array of shape (nnz,)
        Atom of each entry.
    value : float32 array of shape (nnz,)
        Code, > 0.
    """

    indptr: NDArray[np.int64]
    atom: NDArray[np.uint32]
    value: NDArray[np.float32]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def row(self) -> NDArray[np.int64]:
        """Row of each entry: int64 array of shape (nnz,)."""
        return np.repeat(np.arange(self.n_rows), np.diff(self.indptr))

    def frame(self) -> pl.DataFrame:
        """One line per code: row (UInt32), atom (UInt32), value (Float32); by row, then atom."""
        import polars as pl

        row = self.row.astype(np.uint32)
        return pl.DataFrame({"row": row, "atom": self.atom, "value": self.value})

    def renamed(self, place: NDArray[np.uint32]) -> Codes:
        """Codes whose atom `i` is called ``place[i]``, ascending within a row again."""
        atom = place[self.atom]
        order = np.lexsort((atom, self.row))
        return Codes(self.indptr, atom[order], self.value[order])

    def take(self, rows: NDArray[np.integer[Any]]) -> Codes:
        """Codes of some of the rows, in the order given."""
        start, length = self.indptr[rows], np.diff(self.indptr)[rows]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
        place = np.repeat(start - indptr[:-1], length) + np.arange(indptr[-1])
        return Codes(indptr, self.atom[place], self.value[place])

    def scaled(self, factor: NDArray[np.float64]) -> Codes:
        """Codes of atom `i` times ``factor[i]``."""
        return Codes(self.indptr, self.atom, (self.value * factor[self.atom]).astype(np.float32))

    def matrix(self, n_atoms: int) -> Matrix:
        """The same as a float32 scipy.sparse.csr_array of shape (n_rows, n_atoms)."""
        from scipy.sparse import csr_array

        parts = (self.value, self.atom.astype(np.int64), self.indptr)
        return csr_array(parts, shape=(self.n_rows, n_atoms))

    def through(self, links: NDArray[np.float32]) -> Codes:
        """Codes one level down, by way of what the atoms are made of.

        Parameters
        ----------
        links : float32 array of shape (n_atoms, n_finer)
            How each atom is made of finer ones.
        """
        parent, child = np.nonzero(links)
        first = np.searchsorted(parent, np.arange(len(links) + 1))
        n_children = np.diff(first)[self.atom]
        offset = np.arange(n_children.sum()) - np.repeat(
            np.cumsum(n_children) - n_children, n_children
        )
        place = np.repeat(first[self.atom], n_children) + offset
        share = links[parent[place], child[place]].astype(np.float64)
        key = np.repeat(self.row, n_children) * links.shape[1] + child[place]
        cells, where = np.unique(key, return_inverse=True)
        value = np.bincount(where, np.repeat(self.value, n_children) * share, len(cells))
        row, atom = np.divmod(cells, links.shape[1])
        indptr = np.searchsorted(row, np.arange(self.n_rows + 1)).astype(np.int64)
        return Codes(indptr, atom.astype(np.uint32), value.astype(np.float32))

    @classmethod
    def join(cls, parts: Sequence[Codes]) -> Codes:
        """Codes of several sets of rows, one after the other."""
        lengths = [np.diff(part.indptr) for part in parts]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
        atom = np.concatenate([part.atom for part in parts])
        return cls(indptr, atom, np.concatenate([part.value for part in parts]))

    def __repr__(self) -> str:
        mean = len(self.atom) / max(1, self.n_rows)
        return f"Codes({self.n_rows} rows, {mean:.1f} atoms a row)"
