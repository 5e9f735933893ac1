"""The two solvers in Rust behind one call: absolute and squared error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Level, by_use
from moecollab.record.rows import Rows

if TYPE_CHECKING:
    from moecollab._core import EncodeSettings, Fit, FitSettings, FittedLevel, HistoryRow

Capped: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float64]]
"""Atoms (n_atoms, n_sites) and the largest allowed code of each (n_atoms,)."""
PASSES = 8.0
"""Passes of the online learner over the rows at most; it ends when nothing is gained."""
CODE_TOLERANCE = 1e-4


def run_engine(
    rows: Rows,
    settings: Mapping[str, Any],
    watch: Callable[[HistoryRow], None],
    first: Level | None = None,
) -> Fit:
    """What the solver of ``settings["loss"]`` finds in rows; "l1" also below a given level 1."""
    from moecollab._core import fit_dictionary, fit_square

    arrays = (rows.indptr, rows.sites, rows.values)
    common: FitSettings = {
        "atoms": settings["atoms"],
        "copies": settings["copies"],
        "dictionary_size": float(settings["dictionary_size"]),
        "sparsity": float(settings["sparsity"]),
        "reconstruction": float(settings["reconstruction"]),
        "max_iterations": settings["max_iterations"],
        "tolerance": float(settings["tolerance"]),
        "seed": settings["seed"],
        "threads": settings["threads"] or 0,
    }
    if settings["loss"] == "l1":
        start = None if first is None else (first.atoms, first.peak.astype(np.float32))
        return fit_dictionary(arrays, rows.n_sites, common, watch, start)
    return fit_square(arrays, rows.n_sites, {**common, "passes": PASSES, "batch": 0}, watch)


def found_levels(found: Fit, loss: str) -> tuple[tuple[Level, ...], Codes]:
    """Levels and the codes of level 1.

    Under squared error the solver's atoms have a Euclidean norm of at most 1. They are scaled to a
    largest entry of 1, codes inversely, so that strengths mean the same under both losses; all
    products stay as they are.
    """
    levels: list[Level] = []
    above: NDArray[np.float64] | None = None
    for level in found["levels"]:
        scale = _largest(level["atoms"]) if loss == "l2" else np.ones(len(level["atoms"]))
        atoms = (level["atoms"] / scale[:, None]).astype(np.float32)
        peak, links = level["peak"] * scale, None
        if above is not None:
            links = (_dense(level, len(scale)) * scale / above[:, None]).astype(np.float32)
            peak = links.max(axis=0, initial=0.0).astype(np.float64)
        frozen = None if links is None else _frozen(links)
        levels.append(Level(_frozen(atoms), _frozen(level["usage"] * scale), _frozen(peak), frozen))
        above = scale
    first = found["levels"][0]
    scale = _largest(first["atoms"]) if loss == "l2" else np.ones(len(first["atoms"]))
    value = (first["value"] * scale[first["atom"]]).astype(np.float32)
    codes = Codes(_frozen(first["indptr"]), _frozen(first["atom"]), _frozen(value))
    if loss == "l1":
        return tuple(levels), codes
    ordered, place = by_use(levels)
    return ordered, codes.renamed(place)


def code_block(rows: Rows, first: Level, settings: Mapping[str, Any], threads: int) -> Codes:
    """Codes of rows on the atoms of level 1, under the loss they were fitted with."""
    if settings["loss"] == "l1":
        return absolute_codes(rows, (first.atoms, first.peak), settings, threads)
    length = np.linalg.norm(first.atoms.astype(np.float64), axis=1)
    length = np.where(length > 0, length, 1.0)
    atoms = (first.atoms / length[:, None]).astype(np.float32)
    codes = squared_codes(rows, (atoms, first.peak * length), settings, threads)
    return codes.scaled(1 / length)


def absolute_codes(rows: Rows, atoms: Capped, settings: Mapping[str, Any], threads: int) -> Codes:
    """Codes of rows on atoms in [0, 1] under absolute error, at most the caps."""
    from moecollab._core import encode

    arrays, (given, caps) = (rows.indptr, rows.sites, rows.values), atoms
    ratio = float(settings["sparsity"]) / float(settings["reconstruction"])
    return Codes(*encode(arrays, given, caps.astype(np.float32), ratio, threads))


def squared_codes(rows: Rows, atoms: Capped, settings: Mapping[str, Any], threads: int) -> Codes:
    """Codes of rows on atoms of norm at most 1 under squared error, at most the caps."""
    from moecollab._core import encode_square

    given, caps = atoms
    how: EncodeSettings = {
        "sparsity": float(settings["sparsity"]),
        "reconstruction": float(settings["reconstruction"]),
        "tolerance": CODE_TOLERANCE,
        "caps": caps.tolist(),
        "gap": False,
        "threads": threads,
    }
    arrays = (rows.indptr, rows.sites, rows.values)
    found = encode_square(arrays, rows.n_sites, given, how)
    return Codes(found["indptr"], found["atom"], found["value"])


def _largest(atoms: NDArray[np.float32]) -> NDArray[np.float64]:
    largest = atoms.max(axis=1, initial=0.0).astype(np.float64)
    return np.where(largest > 0, largest, 1.0)


def _dense(level: FittedLevel, width: int) -> NDArray[np.float64]:
    """Codes of a level as an array of shape (n_rows, width)."""
    indptr = level["indptr"]
    out = np.zeros((len(indptr) - 1, width))
    out[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), level["atom"]] = level["value"]
    return out


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
