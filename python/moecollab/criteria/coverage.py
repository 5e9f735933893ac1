"""Criteria that keep something of all that tokens or patterns draw on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.errors import MissingInputError
from moecollab.patterns.collaboration import Collaboration
from moecollab.record.activations import Activations
from moecollab.record.rows import Rows

POWER = 2.0
"""p: how much worse it is to lose a row's experts together than one each; 1 is not at all."""


def coverage(evidence: Evidence, /) -> NDArray[np.float64]:
    """Harm to a layer's tokens when an expert goes, the least harmful first.

    Formula: in every layer, a token t that draws v_t(s) = g(t, s) ‖f(t, s)‖₂ √(Z(s) / O(s)) from
        expert s has the mass m_t = Σ_s v_t(s), and is harmed by m_t x_t^p, x_t the share of m_t
        that is gone and p = 2; s goes whose going adds least, and s = what it adds then. Z is the
        score ``easy_ep`` and O that of ``reap_sum``: Z / O is the weighted mean of 1 - cos of the
        angle by which the layer's experts turn the stream at the tokens of s, so its root grows
        about as that angle
    Needs: output norms, shift, tokens
    Direction: higher is kept
    Cost: O(n_layers n_tokens top_k) numbers in memory, and as many operations for each time that
        all sites are looked at again, lazily; 0.4 s for 8,192 tokens of 58 layers × 256 experts
    Source: ours, near the maximisation of submodular coverage by greedy removal, evaluated lazily
        as by Minoux 1978. With p = 1 it is √(Z O)
    Not defined when: never; an expert without tokens scores 0
    """
    rows = by_layer(turned(token_rows(evidence), evidence), evidence)
    return harm(rows).reshape(evidence.shape)


def output_coverage(evidence: Evidence, /) -> NDArray[np.float64]:
    """As ``coverage`` where it is not known how far experts turn the stream.

    Formula: as ``coverage`` with v_t(s) = g(t, s) ‖f(t, s)‖₂
    Needs: output norms, tokens
    Direction: higher is kept
    Cost: as ``coverage``
    Source: ours, as ``coverage``. With p = 1 it is ``reap_sum``
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(by_layer(token_rows(evidence), evidence)).reshape(evidence.shape)


def pattern_coverage(evidence: Evidence, /) -> NDArray[np.float64]:
    """Harm to a layer's part in patterns when an expert goes, the least first.

    Formula: as ``coverage`` with an atom a of level 1 in place of a token, v_a(s) = D(a, s) usage_a
        √(Z(s) O(s)) / max(X(s), Σ_a D(a, s) usage_a), X(s) the sum of the fitted rows; what atoms
        leave of √(Z(s) O(s)) is a row of its own
    Needs: output norms, shift, tokens, collaboration
    Direction: higher is kept
    Cost: reads the recording to add up X, then O(n_atoms n_sites) for each time that all sites are
        looked at again, lazily
    Source: ours, as ``coverage``. With p = 1 it is √(Z O)
    Not defined when: never; an expert without tokens scores 0, one in no pattern its √(Z O)
    """
    rows = by_layer(turned(pattern_rows(evidence), evidence), evidence)
    return harm(rows).reshape(evidence.shape)


def harm(
    rows: Rows, weight: NDArray[np.float64] | None = None, power: float = POWER
) -> NDArray[np.float64]:
    """What each site adds to Σ_r w_r m_r x_r^p when it goes, the least first.

    Parameters
    ----------
    rows : Rows
        What depends on the sites; m_r is the sum of a row and x_r the share of it that is gone.
    weight : float64 array of shape (n_rows,), optional
        w_r ≥ 0; 1 by default.
    power : float
        p ≥ 1; with 1 the sums of the columns are returned.

    Returns
    -------
    float64 array of shape (n_sites,)
        Never falls along the order in which sites go; of equal sites the larger goes first.

    Examples
    --------
    Two rows with the sites 0 and 1, and 1 and 2: site 1 is needed by both.

    >>> harm(Rows.of([[2, 2, 0], [0, 2, 2]])).tolist()
    [1.0, 6.0, 1.0]
    """
    from moecollab._core import coverage_order

    weight = np.ones(rows.n_rows) if weight is None else weight
    arrays = (rows.indptr, rows.sites, rows.values)
    return coverage_order(arrays, rows.n_sites, weight, power)["damage"]


def token_rows(evidence: Evidence) -> Rows:
    """A row for each token: g ‖f‖ of every site that it was routed to."""
    return _activations(evidence).rows("token", "output")


def by_layer(rows: Rows, evidence: Evidence) -> Rows:
    """Each row cut into one for every layer that it has entries in."""
    # Rows of patterns have millions of entries, of which nothing wider than they are is made.
    layer = rows.sites // np.uint32(evidence.shape[1])
    begins = np.empty(rows.nnz + 1, np.bool_)  # one more, for empty rows at the end
    np.not_equal(layer[1:], layer[:-1], out=begins[1:-1])
    begins[rows.indptr] = True
    start = np.flatnonzero(begins[:-1])
    row = np.searchsorted(rows.indptr, start, side="right") - 1
    indptr = np.append(start, rows.nnz)
    return Rows(indptr, rows.sites, rows.values, rows.sample[row], rows.n_sites)


def turned(rows: Rows, evidence: Evidence) -> Rows:
    """Rows with values times about the angle by which each site's layer turns the stream."""
    shift, output = (evidence.tallies[name].ravel() for name in ("sum_shift", "sum_weighted_norm"))
    factor = np.divide(shift, output, out=np.zeros(len(output)), where=output > 0)
    values = rows.values * np.sqrt(factor).astype(np.float32)[rows.sites]
    return Rows(rows.indptr, rows.sites, values, rows.sample, rows.n_sites)


def pattern_rows(evidence: Evidence, number: int = 0) -> Rows:
    """What live atoms of a level draw from each site, in units of g ‖f‖, then what is left.

    Parameters
    ----------
    evidence : Evidence
        With activations and a collaboration.
    number : int
        Place of the level; -1 is the finest.

    Returns
    -------
    Rows
        A row for each atom, then one for each site; columns add up to Σ_t g ‖f‖.
    """
    level = _collaboration(evidence).levels[number]
    total = np.zeros(level.atoms.shape[1])
    for rows in fitted_rows(evidence):
        total += np.bincount(rows.sites, rows.values, rows.n_sites)
    usage = np.where(level.peak > 0, level.usage, 0.0)
    output = evidence.tallies["sum_weighted_norm"].ravel()
    return explained_rows(level.atoms, usage, total, output)


def fitted_rows(evidence: Evidence) -> Iterator[Rows]:
    """The rows that the patterns were fitted to, block by block where they are tokens."""
    acts, settings = _activations(evidence), _collaboration(evidence).settings
    if settings["rows"] == "token":
        return acts.token_blocks(settings["weights"])
    return iter([acts.rows(settings["rows"], settings["weights"])])


def explained_rows(
    atoms: NDArray[np.float32],
    usage: NDArray[np.float64],
    fitted: NDArray[np.float64],
    output: NDArray[np.float64],
) -> Rows:
    """What atoms draw from each site in other units than they were fitted in, then what is left.

    Parameters
    ----------
    atoms : float32 array of shape (n_atoms, n_sites)
        Strengths.
    usage : float64 array of shape (n_atoms,)
        Total code of each atom.
    fitted : float64 array of shape (n_sites,)
        What the atoms were to explain, in their units.
    output : float64 array of shape (n_sites,)
        The same in the units wanted.

    Returns
    -------
    Rows
        A row for each atom, then one for each site; columns add up to `output`.
    """
    n_sites = atoms.shape[1]
    explained: NDArray[np.float64] = np.zeros(n_sites)
    for atom, use in zip(atoms, usage, strict=True):
        explained += use * atom
    whole = np.maximum(fitted, explained)
    share: NDArray[np.float64] = np.zeros(n_sites)
    np.divide(output, whole, out=share, where=whole > 0)
    sites, values, each = [], [], share.astype(np.float32)
    for atom, use in zip(atoms, usage.astype(np.float32), strict=True):
        drawn = atom * use * each  # one atom at a time stays in the processor's cache
        sites.append(np.flatnonzero(drawn > 0).astype(np.uint32))
        values.append(drawn[sites[-1]])
    lengths = [*map(len, sites), *[1] * n_sites]
    left = np.maximum(output - explained * share, 0).astype(np.float32)
    return Rows(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        np.concatenate([*sites, np.arange(n_sites, dtype=np.uint32)]),
        np.concatenate([*values, left]),
        np.arange(len(lengths), dtype=np.uint32),
        n_sites,
    )


def _activations(evidence: Evidence) -> Activations:
    if evidence.activations is None:
        raise MissingInputError("single tokens are needed; pass activations that hold them")
    return evidence.activations


def _collaboration(evidence: Evidence) -> Collaboration:
    if evidence.collaboration is None:
        raise MissingInputError("patterns are needed; fit them on these activations")
    return evidence.collaboration


_TOKENS = Needs.OUTPUT_NORMS | Needs.TOKENS
CRITERIA = (
    Criterion("coverage", _TOKENS | Needs.SHIFT, coverage),
    Criterion("output_coverage", _TOKENS, output_coverage),
    Criterion("pattern_coverage", _TOKENS | Needs.SHIFT | Needs.COLLABORATION, pattern_coverage),
)
