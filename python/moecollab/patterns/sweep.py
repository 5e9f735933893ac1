"""One fit per setting and seed, side by side, to choose the size and the weights of HSDL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from moecollab.errors import DataError, SettingsError
from moecollab.patterns.stability import stability
from moecollab.patterns.transform import absolute_error
from moecollab.progress import track
from moecollab.record.activations import Activations
from moecollab.record.rows import Rows
from moecollab.settings import check_whole, is_real

if TYPE_CHECKING:
    import polars as pl

    from moecollab.patterns.codes import Codes
    from moecollab.patterns.collaboration import Collaboration
    from moecollab.patterns.dictionary import HSDL

MEMBER = 0.5


def run_sweep(
    hsdl: HSDL,
    acts: Activations | Rows,
    grid: dict[str, Sequence[Any]],
    *,
    seeds: int,
    held_out: float,
) -> pl.DataFrame:
    """A line per setting and seed; see :meth:`moecollab.HSDL.sweep`."""
    import polars as pl

    check_whole("seeds", seeds, 1)
    if not is_real(held_out) or not 0 < held_out < 1:
        raise SettingsError("held_out", held_out, "above 0 and below 1")
    rows = acts if isinstance(acts, Rows) else acts.rows(hsdl.rows, hsdl.weights)
    fitted, kept = _split(rows, held_out, hsdl.seed)
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    lines = []
    with track("sweep", len(settings) * seeds) as bar:
        for setting in settings:
            fits, found = [], []
            for seed in range(hsdl.seed, hsdl.seed + seeds):
                begin = time.perf_counter()
                fits.append(replace(hsdl, **setting, seed=seed).fit(fitted))
                seconds = time.perf_counter() - begin
                found.append(setting | {"seed": seed} | _line(fits[-1], kept, seconds))
                bar.advance()
            agreement = stability(fits) if seeds > 1 else None
            lines += [line | {"stability": agreement} for line in found]
    named = [line | {"atoms": _words(line["atoms"])} if "atoms" in line else line for line in lines]
    return pl.DataFrame(named)


def _line(fit: Collaboration, kept: Rows, seconds: float) -> dict[str, Any]:
    first = fit.levels[0]
    live = fit.live(1)
    members = (first.atoms[live] >= MEMBER).sum(axis=1)
    covered = (first.atoms[live] >= MEMBER).any(axis=0) if live.any() else np.zeros(fit.n_sites)
    return {
        "objective": fit.objective,
        "held_out_error": relative_error(fit, kept, fit.transform(kept, threads=None)),
        "live": int(live.sum()),
        "live_finest": int(fit.live(len(fit.levels)).sum()),
        "members": float(members.mean()) if live.any() else 0.0,
        "codes_per_row": len(fit.codes.atom) / max(1, fit.n_rows),
        "covered": float(covered.mean()),
        "seconds": seconds,
    }


def relative_error(fit: Collaboration, rows: Rows, codes: Codes) -> float:
    """Sum of absolute errors of level 1 over the sum of the rows; 1 if nothing is explained."""
    error = absolute_error(fit.levels[0].atoms, rows, codes)
    return error / float(rows.values.sum(dtype=np.float64))


def _split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to fit and rows to judge by, drawn by sample so that no document is in both."""
    samples = np.unique(rows.sample)
    n_kept = round(share * len(samples))
    if not 0 < n_kept < len(samples):
        raise DataError(
            f"{len(samples)} samples cannot be split into {1 - share:.0%} to fit and {share:.0%} "
            "to judge by; record more samples or change held_out"
        )
    kept = np.random.default_rng(seed).permutation(samples)[:n_kept]
    held = np.isin(rows.sample, kept)
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def _words(atoms: tuple[int, ...] | None) -> str:
    return "default" if atoms is None else ", ".join(str(count) for count in atoms)
