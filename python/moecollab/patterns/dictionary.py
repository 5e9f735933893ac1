"""HSDL: groups of experts that work together, by hierarchical sparse dictionary learning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np

from moecollab.errors import ConvergenceWarning, SettingsError
from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Collaboration, Level
from moecollab.patterns.engines import found_levels, run_engine
from moecollab.patterns.estimator import Estimator
from moecollab.patterns.sizes import level_sizes
from moecollab.patterns.storage import load_collaboration
from moecollab.patterns.streaming import fit_streamed
from moecollab.patterns.together import fit_together
from moecollab.progress import track
from moecollab.record.activations import Activations, Grain, Weights
from moecollab.record.rows import Matrix, Rows
from moecollab.settings import check_whole, is_real, is_whole

if TYPE_CHECKING:
    import polars as pl

    from moecollab._core import Fit, HistoryRow

__all__ = ["HSDL", "Codes", "Collaboration", "Level", "load_collaboration"]

Loss: TypeAlias = Literal["l1", "l2"]
SPARSITY = {"l1": 1.0, "l2": 0.1}
"""λ₁ over λ₂ unless given."""
DONE = ("tolerance", "max iterations")
SMALLEST = float(np.finfo(np.float64).tiny)


@dataclass(kw_only=True)
class HSDL(Estimator):
    """Settings of hierarchical sparse dictionary learning (arXiv:2504.12359).

    Rows X (tokens or samples over experts) are written as codes times atoms, and the atoms of each
    level as codes times finer atoms, so that the sum over levels of

    - dictionary_size times the largest code of each atom (atoms that do not pay are switched off),
    - sparsity times the usage-weighted mean of code sums,
    - reconstruction times the usage-weighted mean of absolute errors

    is small, with atoms in [0, 1] and codes ≥ 0 (eqs. 4 to 7 with sums written out; the usage
    weights are held fixed within a stage and refreshed between stages). The solver is ours: exact
    block steps by weighted medians, with moves that add, join, remove and exchange atoms; within a
    stage the objective never rises. Level 1 is fitted first; level 2 starts from pieces of its
    atoms, since the objective alone would let it copy them; then both are fitted together.

    Level 1 starts from rows of the data: on a sample if there are many rows, where all moves are
    tried, then on all of them with block steps alone.

    All terms of level 1 scale alike with the rows. Those of finer levels do not: where rows are far
    below 1 (a tenth of renormalised weights still does no harm), finer levels do not pay and die.

    The default weights are equal, so that a lone expert never makes an atom; a small λ₁ spends
    atoms on single experts.

    Parameters
    ----------
    atoms : tuple of int, optional
        Atoms of each level, coarse to fine. By default 0.3 and 1.2 times the number of experts, at
        most 512 and 2048 and no more than there are rows.
    dictionary_size : float
        Weight of the dictionary size, ≥ 0: 1 in the paper; at 0 no atom is switched off.
    sparsity : float, optional
        λ₁ ≥ 0, weight of the code sums; λ₂ if not given, and λ₂/10 under squared error. An atom
        with m members pays in a row where more than (m + λ₁/λ₂)/2 of them are active; with λ₁ = λ₂
        a lone expert never pays, so that every atom is a group.
    reconstruction : float
        λ₂ > 0, weight of the errors. An atom is kept if the mean error it removes per row, times
        this, exceeds its largest code: with 300, if it nets one expert in 0.33% of the rows.
    loss : {"l1", "l2"}
        Absolute errors, as in the paper, or half squared ones: non-negative sparse coding with
        atoms of Euclidean norm 1, learned online and settled by exact steps. Atoms are reported
        with a largest entry of 1 all the same, codes inversely; the history is that of the
        solver's own scale.
    copies : bool
        Whether finer levels may copy the atoms above. By itself the objective prefers that nearly
        everywhere, and then they say nothing new. By default they start from pieces instead; under
        absolute errors they stay that, at a higher objective (``docs/performance.md``). Under
        squared error the steps turn most of them into copies all the same.
    rows : {"token", "sample", "sample_sum"}
        What a row of activations stands for: see :meth:`moecollab.Activations.rows`.
    weights : {"renormalised", "raw", "binary", "output"}
        What an entry of activations is.
    max_iterations : int
        Iterations of a stage at most, ≥ 1.
    tolerance : float
        A stage ends when an iteration lowers the objective by no more than this fraction, ≥ 0.
    seed : int
        Seed of the starting atoms, in [0, 2⁶³).
    n_init : int
        Fits from this many seeds, counted from `seed`; the one of the lowest objective is kept
        (under squared error: before its levels move together). On real routing seeds differ by a
        few percent.
    threads : int, optional
        Threads; one per processor by default. The result is the same for any number.
    rows_in_memory : int
        Token rows held at once, at least as many as atoms of level 1. With more, the atoms are
        fitted to a sample of this size, then passes go over all rows block by block, moving the
        atoms, until one gains less than the tolerance: memory does not grow with the text. Files of
        the checkpoint (or of the folder for temporary files) take about three times the codes.

    Examples
    --------
    >>> HSDL(atoms=(16, 32), seed=1).atoms
    (16, 32)
    """

    atoms: tuple[int, ...] | None = None
    dictionary_size: float = 1.0
    sparsity: float | None = None
    reconstruction: float = 300.0
    loss: Loss = "l1"
    copies: bool = False
    rows: Grain = "token"
    weights: Weights = "renormalised"
    max_iterations: int = 100
    tolerance: float = 1e-3
    seed: int = 0
    n_init: int = 1
    threads: int | None = None
    rows_in_memory: int = 524_288

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.atoms is not None:
            _check_atoms(self.atoms)
        at_least = "a finite number of at least 0"
        _check_real("dictionary_size", self.dictionary_size, 0.0, at_least)
        if self.sparsity is not None:
            _check_real("sparsity", self.sparsity, 0.0, at_least)
        _check_real("reconstruction", self.reconstruction, SMALLEST, "a finite number above 0")
        _check_real("tolerance", self.tolerance, 0.0, at_least)
        words = {"rows": get_args(Grain), "weights": get_args(Weights), "loss": get_args(Loss)}
        for name, kinds in words.items():
            if getattr(self, name) not in kinds:
                raise SettingsError(name, getattr(self, name), f"one of {', '.join(kinds)}")
        if not isinstance(self.copies, bool):
            raise SettingsError("copies", self.copies, "True or False")
        check_whole("max_iterations", self.max_iterations, 1)
        check_whole("seed", self.seed, 0)
        check_whole("n_init", self.n_init, 1)
        check_whole("rows_in_memory", self.rows_in_memory, 1)
        if self.threads is not None:
            check_whole("threads", self.threads, 1)

    def fit(
        self,
        acts: Activations | Rows | Matrix,
        y: object = None,  # noqa: ARG002 (a pipeline passes it)
        *,
        checkpoint: str | PathLike[str] | None = None,
    ) -> Collaboration:
        """Groups of experts in activations or in rows made of them.

        Parameters
        ----------
        acts : Activations, Rows, or matrix of shape (n_rows, n_sites)
            What the routers did. Rows and matrices (dense or SciPy sparse) know no layers: all
            their sites count as one layer's.
        y : ignored
            There so that a scikit-learn pipeline can pass it.
        checkpoint : path, optional
            Folder for what a fit on more rows than `rows_in_memory` has done so far; a stopped fit
            goes on from there with the same result. It may be deleted afterwards.

        Raises
        ------
        SettingsError
            When more atoms are asked for than there are rows.
        DataError
            When there are no rows, or values are negative or not finite.

        Warns
        -----
        ConvergenceWarning
            When the fit was stopped before its tolerance was met; the result is the best so far.
        """
        self.__post_init__()
        if self._must_stream(acts):
            folder = None if checkpoint is None else Path(checkpoint)
            return self._noted(fit_streamed(self, cast("Activations", acts), folder))
        if not isinstance(acts, Activations):
            return self._noted(self.fit_rows(acts if isinstance(acts, Rows) else Rows.of(acts)))
        found = self.fit_rows(acts.rows(self.rows, self.weights))
        digest = acts.digest()
        return self._noted(
            replace(found, layers=acts.layers, n_experts=acts.n_experts, activations=digest)
        )

    def fit_rows(self, rows: Rows, first: Level | None = None) -> Collaboration:
        """Groups of sites in rows held in memory; below the atoms of level 1 if they are given."""
        atoms = level_sizes(self.atoms, rows.n_rows, rows.n_sites)
        settings = asdict(self) | {"atoms": list(atoms), "sparsity": self._sparsity()}
        found = self._best(rows, settings, first)
        del settings["threads"]
        levels, codes = found_levels(found, self.loss)
        collab = Collaboration(
            levels=levels,
            codes=codes,
            history=tuple(dict(row) for row in found["history"]),
            stop_reason=found["stop_reason"],
            layers=(0,),
            n_experts=rows.n_sites,
            settings=settings,
        )
        if self.loss == "l2" and len(atoms) > 1 and collab.stop_reason in DONE:
            return fit_together(collab, rows, self.threads)
        return collab

    def _sparsity(self) -> float:
        """λ₁ as given, or what goes with λ₂."""
        if self.sparsity is not None:
            return float(self.sparsity)
        return float(self.reconstruction) * SPARSITY[self.loss]

    def _must_stream(self, acts: object) -> bool:
        large = isinstance(acts, Activations) and acts.n_tokens > self.rows_in_memory
        return large and self.rows == "token"

    def _noted(self, collab: Collaboration) -> Collaboration:
        """The result, kept; with a warning if it is not the end."""
        if not collab.converged:
            text = _warning(collab, self.tolerance)
            if self.atoms is not None and len(collab.levels) < len(self.atoms):
                text += "; its finer levels were not reached"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        self.collaboration_ = collab
        return collab

    def sweep(
        self,
        acts: Activations | Rows,
        *,
        seeds: int = 2,
        held_out: float = 0.2,
        **grid: Sequence[Any],
    ) -> pl.DataFrame:
        """Fits every combination of some settings, several seeds each, to choose among them.

        Parameters
        ----------
        acts : Activations or Rows
            What is fitted.
        seeds : int
            Seeds per combination, counted from `seed`, ≥ 1.
        held_out : float
            Share of the samples that judges the fits and is not fitted, in (0, 1).
        **grid : sequences
            Values to try, by the name of a setting: ``reconstruction=(100, 300)``.

        Returns
        -------
        polars.DataFrame
            A line per combination and seed: the settings, seed, objective, held_out_error
            (relative absolute error of level 1 on the held-out rows), live and live_finest (atoms
            in use at level 1 and the last), members (mean experts of an atom with a strength of at
            least 0.5), codes_per_row, covered (share of experts that are in a live atom), seconds,
            stability (mean cosine of matched atoms between the seeds, null for one seed).

        Raises
        ------
        SettingsError
            When a name is not a setting, or a value is out of range.
        """
        from moecollab.patterns.sweep import run_sweep

        for name, values in grid.items():
            for value in values:
                replace(self).set_params(**{name: value})
        return run_sweep(self, acts, grid, seeds=seeds, held_out=held_out)

    def _best(self, rows: Rows, settings: dict[str, Any], first: Level | None) -> Fit:
        """The fit of the lowest objective of those from `n_init` seeds."""
        best = self._run(rows, settings, first)
        for seed in range(self.seed + 1, self.seed + self.n_init):
            if best["stop_reason"] not in DONE:
                break
            found = self._run(rows, settings | {"seed": seed}, first)
            if found["stop_reason"] == "interrupted":
                return best | {"stop_reason": "interrupted"}
            best = min(best, found, key=lambda fit: fit["history"][-1]["total"])
        return best

    def _run(self, matrix: Rows, settings: dict[str, Any], first: Level | None) -> Fit:
        with track("fit patterns") as bar:

            def watch(row: HistoryRow) -> None:
                bar.advance()
                live = f"{row['live']} atoms in use"
                bar.remark(f"{row['stage']}: objective {row['total']:.6g}, {live}")

            return run_engine(matrix, settings, watch, first)


def _check_atoms(atoms: object) -> None:
    allowed = "a tuple of counts of at least 1, one per level"
    if not isinstance(atoms, tuple) or not atoms:
        raise SettingsError("atoms", atoms, allowed)
    for count in atoms:
        if not is_whole(count) or not 1 <= count < 2**32 - 1:
            raise SettingsError("atoms", atoms, allowed)


def _check_real(name: str, value: object, least: float, allowed: str) -> None:
    if not is_real(value) or not least <= float(str(value)) < math.inf:
        raise SettingsError(name, value, allowed)


def _warning(collab: Collaboration, tolerance: float) -> str:
    rows = [row for row in collab.history if row["stage"] != "final"]
    last = rows[-1]
    before = rows[-2]["total"] if len(rows) > 1 else math.nan
    same = len(rows) > 1 and rows[-2]["stage"] == last["stage"]
    change = (before - last["total"]) / before if same and before else math.nan
    advice = "raise max_iterations" if collab.stop_reason == "max iterations" else "fit again"
    return (
        f"the fit was stopped by {collab.stop_reason} in stage {last['stage']} after "
        f"{last['iteration']} iterations, the last change was {change:.2g} and the tolerance "
        f"{tolerance:.2g}; the best result so far is returned, {advice} to go on"
    )
