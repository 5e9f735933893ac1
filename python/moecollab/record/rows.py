"""The activation matrix as sparse rows: what pattern learning reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, ShapeError

Matrix: TypeAlias = Any
"""A dense array or SciPy sparse matrix of shape (n_rows, n_sites)."""


@dataclass(frozen=True)
class Rows:
    """Sparse rows over sites (compressed sparse rows); the paper's X, transposed.

    Sites are ascending within a row, without duplicates; values are finite and > 0.

    Parameters
    ----------
    indptr : int64 array of shape (n_rows + 1,)
        Row `i` owns entries ``indptr[i]:indptr[i + 1]``.
    sites : uint32 array of shape (nnz,)
        Site of each entry, in [0, n_sites).
    values : float32 array of shape (nnz,)
        Value of each entry.
    sample : uint32 array of shape (n_rows,)
        Sample that each row belongs to.
    n_sites : int
        Number of routed experts of the model, over all layers.
    """

    indptr: NDArray[np.int64]
    sites: NDArray[np.uint32]
    values: NDArray[np.float32]
    sample: NDArray[np.uint32]
    n_sites: int

    def __post_init__(self) -> None:
        """Checks dtypes, lengths and that indptr is a row pointer."""
        dtypes = {"indptr": np.int64, "sites": np.uint32, "values": np.float32, "sample": np.uint32}
        for name, dtype in dtypes.items():
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype or not array.flags.c_contiguous:
                got = f"{array.dtype}{array.shape}"
                raise ShapeError(f"{name} is {got}; expected contiguous 1-D {np.dtype(dtype).name}")
        self._check_lengths()

    def _check_lengths(self) -> None:
        if len(self.indptr) != len(self.sample) + 1:
            raise ShapeError(
                f"indptr has {len(self.indptr)} entries for {len(self.sample)} rows; "
                "expected one more than rows"
            )
        ends = (int(self.indptr[0]), int(self.indptr[-1]))
        if ends != (0, len(self.sites)) or len(self.sites) != len(self.values):
            raise ShapeError(
                f"indptr spans {ends} but there are {len(self.sites)} sites and "
                f"{len(self.values)} values; build indptr from the row lengths"
            )
        if (np.diff(self.indptr) < 0).any():
            raise ShapeError("indptr decreases; build it from the row lengths")
        if len(self.sites) and int(self.sites.max()) >= self.n_sites:
            raise ShapeError(
                f"site {int(self.sites.max())} is outside [0, {self.n_sites}); check n_sites"
            )
        if not np.isfinite(self.values).all():
            raise DataError("values of the rows are not finite; record the activations again")

    @classmethod
    def of(cls, matrix: Matrix) -> Rows:
        """Rows of a dense array or a SciPy sparse matrix of shape (n_rows, n_sites).

        Each row is a sample of its own; zeros are left out, values become float32.

        Raises
        ------
        ShapeError
            When the matrix does not have two axes or holds no numbers.
        DataError
            When values are not finite.
        """
        if hasattr(matrix, "tocsr"):
            sparse = matrix.tocsr(copy=True)
            sparse.sum_duplicates()
            sparse.eliminate_zeros()
            parts, shape = (sparse.indptr, sparse.indices, sparse.data), sparse.shape
        else:
            dense = np.asarray(matrix)
            if dense.ndim != 2 or dense.dtype.kind not in "biuf":
                got = f"{dense.dtype}{dense.shape}"
                raise ShapeError(f"the matrix is {got}; pass numbers of shape (n_rows, n_sites)")
            row, site = np.nonzero(dense)
            pointers = np.searchsorted(row, np.arange(len(dense) + 1))
            parts, shape = (pointers, site, dense[row, site]), dense.shape
        pointers, site, value = parts
        return cls(
            np.ascontiguousarray(pointers, np.int64),
            np.ascontiguousarray(site, np.uint32),
            np.ascontiguousarray(value, np.float32),
            np.arange(shape[0], dtype=np.uint32),
            int(shape[1]),
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.sample)

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return len(self.sites)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of several sets over the same sites, one after the other."""
        lengths = np.concatenate([np.diff(part.indptr) for part in parts])
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        sites, values, sample = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("sites", "values", "sample")
        )
        return cls(indptr, sites, values, sample, parts[0].n_sites)

    def take(self, rows: NDArray[np.integer[Any]]) -> Rows:
        """Some of the rows, in the order given; each keeps its sample."""
        start, length = self.indptr[rows], np.diff(self.indptr)[rows]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
        place = np.repeat(start - indptr[:-1], length) + np.arange(indptr[-1])
        return Rows(indptr, self.sites[place], self.values[place], self.sample[rows], self.n_sites)

    def dense(self) -> NDArray[np.float32]:
        """The same matrix, dense: float32 array of shape (n_rows, n_sites)."""
        matrix = np.zeros((self.n_rows, self.n_sites), dtype=np.float32)
        row = np.repeat(np.arange(self.n_rows), np.diff(self.indptr))
        matrix[row, self.sites] = self.values
        return matrix

    def __repr__(self) -> str:
        filled = self.nnz / max(1, self.n_rows)
        return f"Rows({self.n_rows} rows × {self.n_sites} sites, {filled:.1f} entries a row)"
