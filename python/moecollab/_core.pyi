"""Types of the Rust core; arrays in, plain dictionaries of arrays out."""

from collections.abc import Callable, Sequence
from typing import TypedDict, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = ["caep_ranking", "count_sets", "encode", "fit_dictionary", "mine_pairs", "mine_sets"]

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

@type_check_only
class MiningSettings(TypedDict):
    """What to mine; every key is needed. `least` is a count; threads 0: one per processor.

    Without `chance`, the three arrays of it are empty.
    """

    n_experts: int
    size: int
    least: int
    top: int
    by_lift: bool
    chance: bool
    threads: int

@type_check_only
class MinedPairs(TypedDict):
    """All pairs (0, 1), (0, 2) … (1, 2) …, arrays of shape (n (n - 1) / 2,); load (n_sites,)."""

    count: NDArray[np.uint32]
    load: NDArray[np.uint32]
    expected: NDArray[np.float64]
    variance: NDArray[np.float64]
    log10_p: NDArray[np.float64]

@type_check_only
class MinedSets(TypedDict):
    """The best sets, site (n_found, size), and in histogram how many of all have each count."""

    site: NDArray[np.uint32]
    count: NDArray[np.uint32]
    load: NDArray[np.uint32]
    histogram: NDArray[np.int64]
    expected: NDArray[np.float64]
    variance: NDArray[np.float64]
    log10_p: NDArray[np.float64]

def mine_pairs(
    rows: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]],
    n_sites: int,
    strata: NDArray[np.uint32] | None,
    settings: MiningSettings,
    watch: Callable[[str, float], object],
) -> MinedPairs:
    """Counts of all pairs of sites, and mean, variance and tail under chance.

    Parameters
    ----------
    rows : tuple of arrays
        As for `fit_dictionary`; a site is active where its value is above 0.
    n_sites : int
        Number of sites.
    strata : uint32 array of shape (n_rows,), or None
        Rows change places only with rows of the same number; None: all with all.
    settings : MiningSettings
        Experts per layer and threads; the rest is not used.
    watch : callable
        Called with the stage and the share of it that is done; what it raises ends the work.
    """

def mine_sets(
    rows: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]],
    n_sites: int,
    strata: NDArray[np.uint32] | None,
    settings: MiningSettings,
    watch: Callable[[str, float], object],
) -> MinedSets:
    """The best sets of three and more sites that at least `least` rows hold.

    Parameters
    ----------
    rows, n_sites, strata, watch
        As for `mine_pairs`.
    settings : MiningSettings
        Size, floor, how many to keep and by what. Expected count, variance and tail are NaN for
        sets inside one layer.
    """

def count_sets(
    rows: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]],
    n_sites: int,
    sets: NDArray[np.uint32],
    threads: int,
) -> NDArray[np.uint32]:
    """How many rows hold all sites of each set (n_sets, size): array of shape (n_sets,)."""
