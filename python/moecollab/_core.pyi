"""Types of the Rust core; arrays in, plain dictionaries of arrays out."""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypedDict, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "caep_ranking",
    "count_sets",
    "coverage_order",
    "encode",
    "encode_square",
    "fit_dictionary",
    "fit_square",
    "learn_square",
    "mine_sets",
    "ranked_choice_falls",
    "read_outputs",
    "step_atoms",
    "step_square",
    "sum_square",
]

_SparseRows: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]
"""Row pointers int64 (n_rows + 1,), sites uint32 (nnz,) ascending within a row, values float32
(nnz,), finite and not negative. Arrays are C-contiguous; `n_sites` is at most 2^24."""

@type_check_only
class FitSettings(TypedDict):
    """What to fit and how long; every key is needed."""

    atoms: Sequence[int]
    copies: bool
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

@type_check_only
class SquareSettings(TypedDict):
    """What to fit under squared error and how long; every key is needed."""

    atoms: Sequence[int]
    copies: bool
    dictionary_size: float
    sparsity: float
    reconstruction: float
    passes: float
    batch: int
    max_iterations: int
    tolerance: float
    seed: int
    threads: int

@type_check_only
class EncodeSettings(TypedDict):
    """How rows are coded under squared error; every key is needed."""

    sparsity: float
    reconstruction: float
    tolerance: float
    caps: Sequence[float] | None
    gap: bool
    threads: int

@type_check_only
class LearnSettings(TypedDict):
    """How the online learner draws batches and forgets; every key is needed."""

    batches: int
    batch: int
    window: int
    exponent: float
    share: float
    sparsity: float
    reconstruction: float
    tolerance: float
    seed: int
    threads: int

@type_check_only
class SquareCodes(TypedDict):
    """Codes as compressed rows; `gap` float64 (n_rows,) if asked for."""

    indptr: NDArray[np.int64]
    atom: NDArray[np.uint32]
    value: NDArray[np.float32]
    gap: NDArray[np.float64] | None

@type_check_only
class LearnerState(TypedDict):
    """Where the online learner stands; `atoms` float32 (n_atoms, n_sites) is the result so far."""

    atoms: NDArray[np.float32]
    second: NDArray[np.float32]
    pull: NDArray[np.float32]
    first: NDArray[np.float32]
    scales: NDArray[np.float32]
    counts: NDArray[np.uint64]
    born: NDArray[np.uint64]
    running: NDArray[np.float64]

@type_check_only
class LearnerStart(TypedDict):
    """Atoms to start from, float32 (n_atoms, n_sites), of norm 1."""

    atoms: NDArray[np.float32]

def fit_dictionary(
    rows: _SparseRows,
    n_sites: int,
    settings: FitSettings,
    watch: Callable[[HistoryRow], object],
    start: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> Fit:
    """Levels of atoms fitted to sparse rows.

    Parameters
    ----------
    rows : _SparseRows
        What to fit.
    n_sites : int
        Number of sites.
    settings : FitSettings
        Atoms per level, weights of the objective, limits, seed, threads (0: one per processor).
    watch : callable
        Called with every history row. KeyboardInterrupt, raised there or pending, ends the fit
        with the best result so far; any other exception is passed on.
    start : tuple of arrays, optional
        Atoms of level 1 and their largest codes, as for :func:`encode`: they are taken as they
        are, finer levels are fitted to them, and then all levels together.
    """

def encode(
    rows: _SparseRows,
    atoms: NDArray[np.float32],
    peak: NDArray[np.float32],
    ratio: float,
    threads: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
    """Codes of sparse rows on fixed atoms: row pointers, atoms ascending within a row, values.

    Parameters
    ----------
    rows : _SparseRows
        What to code.
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
class Departures(TypedDict):
    """Sites uint32 (n_sites,), the first to go first; the damage each adds, float64 by site."""

    order: NDArray[np.uint32]
    damage: NDArray[np.float64]

def coverage_order(
    rows: _SparseRows, n_sites: int, weight: NDArray[np.float64], power: float
) -> Departures:
    """In which order sites go, each time the one that adds least damage.

    The damage of a row is w m xᵖ, with m the sum of its values and x the share that is lost.

    Parameters
    ----------
    rows : _SparseRows
        What depends on the sites.
    n_sites : int
        Number of sites.
    weight : float64 array of shape (n_rows,)
        Weight w of each row, finite and ≥ 0.
    power : float
        p, finite and ≥ 1. Whole powers up to 16 are ten times faster than others.

    Returns
    -------
    dict
        ``order``, of equal sites the larger first; ``damage``, which never falls along the order.
    """

def ranked_choice_falls(
    ballots: NDArray[np.uint16], n_votes: int, n_candidates: int
) -> NDArray[np.uint32]:
    """Candidates in the order in which they fall by ranked-choice voting.

    Each time the candidate with the fewest votes falls, of equals the largest; those who voted for
    it vote for the next one left on their ballot.

    Parameters
    ----------
    ballots : uint16 array of shape (n_voters, width)
        Candidates of each voter, the best first; numbers from `n_candidates` on stand for none.
    n_votes : int
        Votes of each voter: those of its first places.
    n_candidates : int
        Number of candidates.
    """

@type_check_only
class MiningSettings(TypedDict):
    """What to mine; every key is needed. `least` is a count; threads 0: one per processor.

    Without `chance`, the four arrays of it are empty.
    """

    n_experts: int
    size: int
    least: int
    top: int
    by_lift: bool
    chance: bool
    threads: int

@type_check_only
class MinedSets(TypedDict):
    """The best sets, site (n_found, size), and in histogram how many of all have each count.

    The last four say what chance gives each set, NaN where it has nothing to say.
    """

    site: NDArray[np.uint32]
    count: NDArray[np.uint32]
    load: NDArray[np.uint32]
    lift: NDArray[np.float64]
    histogram: NDArray[np.int64]
    expected: NDArray[np.float64]
    variance: NDArray[np.float64]
    log10_p: NDArray[np.float64]
    q: NDArray[np.float64]

def mine_sets(
    rows: _SparseRows,
    n_sites: int,
    strata: NDArray[np.uint32] | None,
    settings: MiningSettings,
    watch: Callable[[str, float], object],
) -> MinedSets:
    """The best sets of sites that at least `least` rows hold, and what chance gives them.

    Parameters
    ----------
    rows : _SparseRows
        A site is active where its value is above 0.
    n_sites : int
        Number of sites.
    strata : uint32 array of shape (n_rows,), or None
        Rows change places only with rows of the same number; None: all with all.
    settings : MiningSettings
        Size, floor (0 for all pairs), how many to keep and by what. Equals are kept in order of
        their sites. `q` is p adjusted for all sets of this size.
    watch : callable
        Called with the stage and the share of it that is done; what it raises ends the work.
    """

def count_sets(
    rows: _SparseRows,
    n_sites: int,
    sets: NDArray[np.uint32],
    threads: int,
) -> NDArray[np.uint32]:
    """How many rows hold all sites of each set (n_sets, size): array of shape (n_sets,)."""

@type_check_only
class OutputReadings(TypedDict):
    """What is known of each slot, in the order of the slots."""

    norm: NDArray[np.float32]
    peak: NDArray[np.float32]
    channel: NDArray[np.uint32]

def read_outputs(
    values: NDArray[np.float32] | NDArray[np.uint16],
    slots: NDArray[np.int64],
    starts: NDArray[np.int64],
    sums: NDArray[np.float64] | None,
    threads: int,
) -> OutputReadings:
    """Norm, largest magnitude and its first channel of some expert outputs, read once.

    Parameters
    ----------
    values : float32 array of shape (n_outputs, width), or uint16
        Outputs; uint16 are the bits of bfloat16.
    slots : int64 array of shape (n_slots,)
        Which outputs to read, those of one site together.
    starts : int64 array of shape (n_sites + 1,)
        Where each site begins in `slots`; read only with `sums`.
    sums : float64 array of shape (n_sites, 2, width), or None
        Gains the sum of each site's outputs and of their squares, added in the order of `slots`.
    threads : int
        Worker threads; 0 is one per processor. The result does not depend on it.
    """

def fit_square(
    rows: _SparseRows,
    n_sites: int,
    settings: SquareSettings,
    watch: Callable[[HistoryRow], object],
) -> Fit:
    """Levels of atoms fitted to sparse rows under squared error.

    The objective, for rows c of weight w (1/N at level 1, usage/N below), atoms d ≥ 0 of Euclidean
    norm at most 1 and codes r ≥ 0, is s Σᵢ max_c R[c,i] + Σ_c w_c (λ₁ Σᵢ R[c,i] + λ₂/2 |x_c − Σᵢ
    R[c,i] dᵢ|²). Level 1 is learned online (stage ``learn 1``: the terms of its records are those
    of the rows since the last one, each coded with the atoms of its moment), then exact steps
    follow (stages ``level 1``, ``level 2``, …, which never rise). `reconstruction` is half the
    squared error.

    Parameters
    ----------
    rows : _SparseRows
        Values at most 1e9; nothing is copied.
    n_sites : int
        Number of sites.
    settings : SquareSettings
        Atoms per level; s, λ₁, λ₂; passes of the online learner and rows of a batch (0: three
        quarters of the number of atoms); limits of the exact steps; seed; threads (0: one per
        processor).
    watch : callable
        As for :func:`fit_dictionary`.
    """

def encode_square(
    rows: _SparseRows,
    n_sites: int,
    atoms: NDArray[np.float32],
    settings: EncodeSettings,
) -> SquareCodes:
    """Codes of sparse rows on fixed atoms, under squared error.

    Minimises λ₁/λ₂ Σᵢ rᵢ + ½|x − Σᵢ rᵢ dᵢ|² over 0 ≤ r ≤ cap for each row by itself.

    Parameters
    ----------
    rows : _SparseRows
        Values at most 1e9; nothing is copied.
    n_sites : int
        Number of sites.
    atoms : float32 array of shape (n_atoms, n_sites)
        Atoms, finite and not negative. Where they or the rows are sparse, the zeros cost nothing.
    settings : EncodeSettings
        λ₁ and λ₂, of which only the ratio matters; a row is done when no code would move by more
        than `tolerance` times that ratio; largest allowed code of each atom; whether to compute
        each row's duality gap (which holds without caps); threads.
    """

def learn_square(
    rows: _SparseRows,
    n_sites: int,
    state: LearnerStart | LearnerState,
    settings: LearnSettings,
) -> LearnerState:
    """The state of the online learner after some more batches.

    Rows are drawn without replacement, in an order of its own for every pass. A run that is cut
    into several calls gives the same bytes as one call. Data larger than memory is passed piece by
    piece, with as many batches as a piece has.

    Parameters
    ----------
    rows : _SparseRows
        Values at most 1e9; nothing is copied.
    n_sites : int
        Number of sites.
    state : dict
        Atoms to start from, or what an earlier call returned.
    settings : LearnSettings
        Batches to do and rows of a batch; after i rows the first j weigh (j/i)^exponent, i at most
        `window`; `share` of the atoms move in a batch; λ₁, λ₂; tolerance of the coder as for
        :func:`encode_square`; seed; threads.

    Returns
    -------
    dict
        The next state; ``running``: rows of this call, the sum of their codes and of half their
        squared errors, each with the atoms of its moment.
    """

@type_check_only
class SquareShare(TypedDict):
    """What rows add to the sums of :func:`step_square`; cost: Σ w r and Σ w ½|x − r D|²."""

    second: NDArray[np.float32]
    pull: NDArray[np.float32]
    cost: NDArray[np.float64]

def step_atoms(
    rows: _SparseRows,
    weight: NDArray[np.float64],
    atoms: NDArray[np.float32],
    codes: _SparseRows,
    threads: int,
) -> NDArray[np.float32]:
    """Better atoms in [0, 1] for rows whose codes stay: float32 (n_atoms, n_sites).

    Lowers Σ_c w_c |x_c − r_c D|₁ by exact steps of one entry after the other.

    Parameters
    ----------
    rows : tuple of arrays
        As for :func:`fit_dictionary`.
    weight : float64 array of shape (n_rows,)
        w, ≥ 0.
    atoms : float32 array of shape (n_atoms, n_sites)
        Where to start, in [0, 1].
    codes : tuple of arrays
        The rows' codes, compressed like rows, over atoms.
    threads : int
        Threads; 0 for one per processor. The result is the same for any number.
    """

def sum_square(
    rows: _SparseRows,
    weight: NDArray[np.float64],
    atoms: NDArray[np.float32],
    codes: _SparseRows,
    threads: int,
) -> SquareShare:
    """A = Σ w r'r (n_atoms, n_atoms) and U = Σ w r'(x − r D) (n_atoms, n_sites) of some rows.

    Both add up over sets of rows that were coded on the same atoms. Parameters are those of
    :func:`step_atoms`, with atoms ≥ 0.
    """

def step_square(
    atoms: NDArray[np.float32],
    second: NDArray[np.float32],
    pull: NDArray[np.float32],
    sweeps: int,
    threads: int,
) -> NDArray[np.float32]:
    """Atoms of norm at most 1 after some sweeps of exact steps (Mairal et al. 2010, algorithm 2).

    Parameters
    ----------
    atoms : float32 array of shape (n_atoms, n_sites)
        Where to start, ≥ 0.
    second, pull : float32 arrays
        A and U, as :func:`sum_square` returns them.
    sweeps : int
        How often every atom is moved.
    threads : int
        Threads; 0 for one per processor.
    """
