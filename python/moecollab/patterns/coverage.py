"""The paper's co-activation test: how many learned patterns are among the most frequent sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import MissingInputError, SettingsError, StaleInputError
from moecollab.patterns.collaboration import Collaboration
from moecollab.patterns.mined import Mined
from moecollab.patterns.mining import count_sets, read_source
from moecollab.record.activations import Activations
from moecollab.record.rows import Rows

Sets: TypeAlias = Iterable[Iterable[tuple[int, int]]]
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


def coverage(
    patterns: Collaboration | Sets,
    mined: Mined,
    acts: Activations | Rows | str | PathLike[str] | None = None,
    *,
    shares: Sequence[float] = SHARES,
) -> pl.DataFrame:
    """Share of the patterns that are among the most frequent sets of their size.

    Parameters
    ----------
    patterns : Collaboration or sets of (layer, expert)
        Of a collaboration all atoms in use, of all levels, with strengths of at least 0.5. Only
        patterns with as many members as the mined sets count, each once.
    mined : Mined
        Sets of two or three members, ranked by how many tokens they are active in.
    acts : Activations, path or Rows, optional
        What was mined; needed when the table does not hold the sets that a share asks for.
    shares : sequence of float
        Shares k of all sets there are, in (0, 1]: the sets of largest count up to k.

    Returns
    -------
    polars.DataFrame
        A row per share: ``share``; ``least_count``, the count of the last set inside;
        ``n_patterns`` of this size; ``covered``, how many of them are inside (of sets with the
        last count as large a part as fits, so it need not be whole); ``coverage``, their share,
        eq. 8 of arXiv:2504.12359; and ``chance``, what sets drawn at random would reach.

    Raises
    ------
    SettingsError
        When a share is out of range, or a pattern names an expert that is not there.
    MissingInputError
        When the histogram or table does not reach as far as a share.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise SettingsError("shares", share, "shares of all sets in (0, 1]")
    sites = _sites(patterns, mined)
    counts = _counts(sites, mined, acts, max(shares, default=1.0))
    rows = [_row(counts, mined, share) for share in shares]
    schema = ["share", "least_count", "n_patterns", "covered", "coverage", "chance"]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _sites(patterns: Collaboration | Sets, mined: Mined) -> NDArray[np.uint32]:
    """Distinct patterns of the mined size, as ascending sites: (n_patterns, size)."""
    sets = _atoms(patterns) if isinstance(patterns, Collaboration) else patterns
    place = {layer: at for at, layer in enumerate(mined.layers)}
    found = set()
    for members in sets:
        members = list(members)
        for layer, expert in members:
            if layer not in place or not 0 <= expert < mined.n_experts:
                raise SettingsError("patterns", (layer, expert), "experts of the mined model")
        sites = sorted({place[layer] * mined.n_experts + expert for layer, expert in members})
        if len(sites) == mined.size:
            found.add(tuple(sites))
    return np.array(sorted(found), np.uint32).reshape(len(found), mined.size)


def _atoms(collab: Collaboration) -> Sets:
    for number in range(1, len(collab.levels) + 1):
        for atom in np.flatnonzero(collab.live(number)).tolist():
            yield [(layer, expert) for layer, expert, _ in collab.members(number, atom)]


def _counts(
    sites: NDArray[np.uint32],
    mined: Mined,
    acts: Activations | Rows | str | PathLike[str] | None,
    share: float,
) -> NDArray[np.int64]:
    """Tokens in which each pattern is active; 0 for one that the table need not hold."""
    if acts is not None:
        source = read_source(acts, mined.n_experts if isinstance(acts, Rows) else None)
        if source.rows.n_rows != mined.n_rows or source.activations != mined.activations:
            raise StaleInputError("the sets were mined from other activations; mine these")
        return count_sets(source.rows, sites).astype(np.int64)
    ranked = mined.complete or mined.settings.get("by") == "count"
    if not ranked or (not mined.complete and mined.table.height < share * mined.n_sets):
        raise MissingInputError(
            f"the table holds {mined.table.height} of {mined.n_sets} sets, fewer than the share "
            f"{share:g} asks for; pass the activations as acts"
        )
    table = mined.table
    place = {layer: at for at, layer in enumerate(mined.layers)}
    keys = [
        table[f"layer_{letter}"].replace_strict(place, return_dtype=pl.UInt32).to_numpy()
        * np.uint32(mined.n_experts)
        + table[f"expert_{letter}"].to_numpy()
        for letter in "abcdef"[: mined.size]
    ]
    known = dict(
        zip(zip(*(key.tolist() for key in keys), strict=True), table["count"], strict=True)
    )
    return np.array([known.get(tuple(row), 0) for row in sites.tolist()], np.int64)


def _row(
    counts: NDArray[np.int64], mined: Mined, share: float
) -> tuple[float, int, int, float, float, float]:
    """One line of the test."""
    wanted = share * mined.n_sets
    table = mined.histogram.sort("count", descending=True)
    reached = table["n_sets"].cum_sum().to_numpy()
    at = int(np.searchsorted(reached, wanted - 1e-6))
    if at >= len(reached):
        raise MissingInputError(
            f"only {mined.n_found} of {mined.n_sets} sets have support of at least {mined.least} "
            f"tokens, fewer than the share {share:g}; mine with a smaller min_support"
        )
    last, ties = int(table["count"][at]), int(table["n_sets"][at])
    fits = (wanted - (reached[at] - ties)) / ties
    covered = float((counts > last).sum() + fits * (counts == last).sum())
    part = covered / len(counts) if len(counts) else float("nan")
    return share, last, len(counts), covered, part, share
