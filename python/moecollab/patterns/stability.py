"""How alike the groups of two fits are, and how they hold up under noise, seeds and less text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import SettingsError
from moecollab.progress import track
from moecollab.record.activations import Activations
from moecollab.record.rows import Rows

if TYPE_CHECKING:
    import polars as pl

    from moecollab.patterns.collaboration import Collaboration
    from moecollab.patterns.dictionary import HSDL

FOUND = 0.8
"""Cosine from which an atom counts as found again."""


def match_atoms(one: Collaboration, other: Collaboration, level: int = 1) -> pl.DataFrame:
    """The live atoms of one fit, each with its partner in another.

    Partners are chosen one to one so that the sum of cosines is largest (assignment problem).

    Parameters
    ----------
    one, other : Collaboration
        Fits over the same experts.
    level : int
        Level whose atoms are compared, from 1.

    Returns
    -------
    polars.DataFrame
        A line per live atom of `one`: atom, other (null without a partner), cosine (0 without
        one), use (its share of all use at that level).
    """
    import polars as pl
    from scipy.optimize import linear_sum_assignment

    if one.n_sites != other.n_sites:
        raise SettingsError("other", f"{other.n_sites} sites", f"fitted over {one.n_sites} sites")
    places = [np.flatnonzero(fit.live(level)) for fit in (one, other)]
    first, second = (
        _unit(fit.levels[level - 1].atoms[at]) for fit, at in zip((one, other), places, strict=True)
    )
    cosine = first @ second.T
    row, column = linear_sum_assignment(-cosine)
    partner = np.full(len(places[0]), -1, np.int64)
    partner[row] = places[1][column]
    value = np.zeros(len(places[0]))
    value[row] = cosine[row, column]
    usage = one.levels[level - 1].usage[places[0]]
    table = {"atom": places[0], "other": partner, "cosine": value, "use": usage / usage.sum()}
    return pl.DataFrame(table).with_columns(
        pl.when(pl.col("other") >= 0).then(pl.col("other")).alias("other")
    )


def stability(fits: Sequence[Collaboration], level: int = 1) -> float:
    """Mean cosine of matched atoms, weighted by use, over all pairs of fits; 1 if all agree.

    Both directions count, so that a fit with few broad groups is not called alike to one with
    many.
    """
    if len(fits) < 2:
        raise SettingsError("fits", len(fits), "at least 2")
    found = [_agreement(match_atoms(one, other, level))[0] for one, other in permutations(fits, 2)]
    return float(np.mean(found))


def robustness(
    hsdl: HSDL,
    acts: Activations | Rows,
    *,
    noise: Sequence[float] = (0.05, 0.1, 0.2),
    shares: Sequence[float] = (0.5, 0.25),
    seeds: int = 3,
    n_experts: int | None = None,
) -> pl.DataFrame:
    """How well the groups of a fit are found again when something changes.

    The reference is `hsdl` as it is. Against it: other seeds; routing in which a share of the
    chosen experts is replaced by random ones of the same layer; random parts of the rows.

    Parameters
    ----------
    hsdl : HSDL
        Settings of every fit.
    acts : Activations or Rows
        What is fitted.
    noise : sequence of float
        Shares of choices replaced, in (0, 1).
    shares : sequence of float
        Parts of the rows kept, in (0, 1).
    seeds : int
        Repetitions of every setting, ≥ 1.
    n_experts : int, optional
        Experts per layer; needed for noise on Rows.

    Returns
    -------
    polars.DataFrame
        change ("seed", "noise" or "rows"), amount, repetition, level, cosine (mean over the
        reference's atoms, weighted by use), found (share of use in atoms matched with a cosine of
        at least 0.8), live (atoms in use).
    """
    import polars as pl

    _check_shares("noise", noise)
    _check_shares("shares", shares)
    rows, n_experts = _rows(hsdl, acts, n_experts)
    if noise and n_experts is None:
        raise SettingsError("n_experts", None, "the number of experts per layer, since rows differ")
    jobs = list(_jobs(rows, (noise, shares, seeds), n_experts))
    lines = []
    with track("robustness", len(jobs) + 1) as bar:
        reference = replace(hsdl).fit(rows)
        bar.advance()
        for change, amount, repetition, changed in jobs:
            seed = hsdl.seed + repetition + 1 if change == "seed" else hsdl.seed
            fit = replace(hsdl, seed=seed).fit(changed())
            for level in range(1, len(fit.levels) + 1):
                cosine, found = _agreement(match_atoms(reference, fit, level))
                live = int(fit.live(level).sum())
                lines.append((change, amount, repetition, level, cosine, found, live))
            bar.advance()
    names = ("change", "amount", "repetition", "level", "cosine", "found", "live")
    return pl.DataFrame(lines, schema=names, orient="row")


def reroute(rows: Rows, n_experts: int, share: float, seed: int) -> Rows:
    """Rows in which a share of the entries went to random other experts of the same layer.

    An entry keeps its value; where two entries of a row meet on one expert, the values add up.
    """
    from scipy.sparse import csr_array

    rng = np.random.default_rng(seed)
    moved = rng.random(rows.nnz) < share
    layer, expert = np.divmod(rows.sites.astype(np.int64), n_experts)
    step = rng.integers(1, n_experts, rows.nnz) if n_experts > 1 else np.zeros(rows.nnz, np.int64)
    site = layer * n_experts + np.where(moved, (expert + step) % n_experts, expert)
    shape = (rows.n_rows, rows.n_sites)
    return Rows.of(csr_array((rows.values, site, rows.indptr), shape=shape))


def _jobs(
    rows: Rows, plan: tuple[Sequence[float], Sequence[float], int], n_experts: int | None
) -> Iterator[tuple[str, float, int, Callable[[], Rows]]]:
    noise, shares, seeds = plan
    for repetition in range(seeds):
        yield "seed", 0.0, repetition, lambda: rows
        for amount in noise if n_experts else ():
            changed = partial(reroute, rows, n_experts or 1, amount, repetition)
            yield "noise", amount, repetition, changed
        for amount in shares:
            yield "rows", amount, repetition, partial(_part, rows, amount, repetition)


def _part(rows: Rows, share: float, seed: int) -> Rows:
    n_kept = max(1, round(share * rows.n_rows))
    return rows.take(np.sort(np.random.default_rng(seed).permutation(rows.n_rows)[:n_kept]))


def _agreement(matches: pl.DataFrame) -> tuple[float, float]:
    """Mean cosine and share of use found again."""
    cosine, use = matches["cosine"].to_numpy(), matches["use"].to_numpy()
    return float(cosine @ use), float(use[cosine >= FOUND].sum())


def _unit(atoms: NDArray[np.float32]) -> NDArray[np.float64]:
    long = atoms.astype(np.float64)
    length = np.linalg.norm(long, axis=1, keepdims=True)
    unit: NDArray[np.float64] = long / np.where(length > 0, length, 1.0)
    return unit


def _rows(hsdl: HSDL, acts: Activations | Rows, n_experts: int | None) -> tuple[Rows, int | None]:
    if isinstance(acts, Activations):
        return acts.rows(hsdl.rows, hsdl.weights), acts.n_experts
    return acts, n_experts


def _check_shares(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not 0 < value < 1:
            raise SettingsError(name, value, "shares above 0 and below 1")
