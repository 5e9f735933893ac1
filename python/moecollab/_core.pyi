"""Types of the Rust core; arrays in, plain dictionaries of arrays out."""

from collections.abc import Callable, Sequence
from typing import TypedDict, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = ["caep_ranking", "encode", "fit_dictionary"]

@type_check_only
class FitSettings(TypedDict):
    """What to fit and how long; every key is needed."""

    atoms: Sequence[int]
    dictionary_size: float
    sparsity: float
    reconstruction: float
    max_iterations: int
    tolerance: float
    seed: int
    threads: int

@type_check_only
class HistoryRow(TypedDict):
    """The terms of the objective after one iteration; `total` is weighted, the others are not."""

    stage: str
    iteration: int
    dictionary_size: float
    sparsity: float
    reconstruction: float
    total: float
    live: int

@type_check_only
class FittedLevel(TypedDict):
    """One level: atoms float32 (n_atoms, n_sites), its codes as compressed rows."""

    atoms: NDArray[np.float32]
    usage: NDArray[np.float64]
    peak: NDArray[np.float64]
    indptr: NDArray[np.int64]
    atom: NDArray[np.uint32]
    value: NDArray[np.float32]

@type_check_only
class Fit(TypedDict):
    """Everything a fit found."""

    levels: list[FittedLevel]
    history: list[HistoryRow]
    stop_reason: str

@type_check_only
class CaepRanking(TypedDict):
    """Step at which each site falls and its contribution before, arrays of shape (n_sites,)."""

    step: NDArray[np.int64]
    contribution: NDArray[np.float64]

def fit_dictionary(
    rows: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]],
    n_sites: int,
    settings: FitSettings,
    watch: Callable[[HistoryRow], object],
) -> Fit:
    """Levels of atoms fitted to sparse rows.

    Parameters
    ----------
    rows : tuple of arrays
        Row pointers int64 (n_rows + 1,), sites uint32 (nnz,) ascending within a row, and values
        float32 (nnz,) that are finite and not negative.
    n_sites : int
        Number of sites.
    settings : FitSettings
        Atoms per level, weights of the objective, limits, seed, threads (0: one per processor).
    watch : callable
        Called with every history row. KeyboardInterrupt, raised there or pending, ends the fit
        with the best result so far; any other exception is passed on.
    """

def encode(
    rows: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]],
    atoms: NDArray[np.float32],
    peak: NDArray[np.float32],
    ratio: float,
    threads: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
    """Codes of sparse rows on fixed atoms: row pointers, atoms ascending within a row, values.

    Parameters
    ----------
    rows : tuple of arrays
        Row pointers int64 (n_rows + 1,), sites uint32 (nnz,) ascending within a row, and values
        float32 (nnz,) that are finite and not negative.
    atoms : float32 array of shape (n_atoms, n_sites)
        Atoms, in [0, 1].
    peak : float32 array of shape (n_atoms,)
        Largest code allowed for each atom, ≥ 0; infinity for none.
    ratio : float
        λ₁ over λ₂: the price of a code in units of absolute error, ≥ 0.
    threads : int
        Threads; 0 for one per processor. The result is the same for any number.
    """

def caep_ranking(
    atoms: NDArray[np.float32],
    usage: NDArray[np.float64],
    peak: NDArray[np.float64],
    threshold_fraction: float,
) -> CaepRanking:
    """When each site falls in CAEP's loop.

    Parameters
    ----------
    atoms : float32 array of shape (n_atoms, n_sites)
        Atoms of one level, in [0, 1].
    usage : float64 array of shape (n_atoms,)
        Total code of each atom; the least used go first, the smaller id first among equals.
    peak : float64 array of shape (n_atoms,)
        Largest code of each atom; those under 0.05 of the largest are removed before the start.
    threshold_fraction : float
        k₁ in (0, 1]: the threshold is the ⌈k₁ n_sites⌉-th largest contribution.

    Returns
    -------
    dict
        ``step``: 0 for a site below the threshold from the start, one more than there are live
        atoms for one that never falls; ``contribution``: e = D r before the fall.
    """
