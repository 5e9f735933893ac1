"""Sums over parts of a recording's documents, from its tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import MissingInputError, ShapeError
from moecollab.record.activations import Activations, LayerTable
from moecollab.record.recorder import Routing
from moecollab.record.sums import SUMS, names_of, zeros
from moecollab.record.tallies import Tallies
from moecollab.record.tallying import Tokens, tally

SINGLE = ("routing", "norms", "pairs", "vocabulary")
"""Groups of sums that tables of single tokens hold; of "norms" all but peaks."""


def tallies_by(
    acts: Activations,
    part: NDArray[np.int64],
    n_parts: int,
    groups: Iterable[str] = ("routing", "norms"),
) -> Tallies:
    """Sums over parts of the documents, in the place of domains; they add up to the recording's.

    Every token's experts, weights and norms are in the tables, so parts can be chosen afterwards.
    One layer is in memory at a time, beside the sums.

    Parameters
    ----------
    acts : Activations
        The recording.
    part : int64 array of shape (n_samples,)
        Part of each document, in [0, n_parts).
    n_parts : int
        Number of parts.
    groups : iterable of str
        What to sum, among `SINGLE`; peaks are not.

    Raises
    ------
    MissingInputError
        When a group is summed while recording only, or norms were not recorded.
    """
    wanted = tuple(groups)
    for group in wanted:
        if group not in SINGLE:
            raise MissingInputError(
                f"sums of {group!r} cannot be had for parts of a recording: its tables do not hold "
                f"them token by token; choose a criterion of {', '.join(SINGLE)}"
            )
    if "norms" in wanted and not acts.has_norms:
        raise MissingInputError(
            f"{acts.path} has no norms; extract again with norms=True (--norms)"
        )
    if part.shape != (acts.n_samples,):
        raise ShapeError(f"part has shape {part.shape}, expected {(acts.n_samples,)}")
    names = tuple(str(number) for number in range(n_parts))
    shape = (n_parts, acts.n_layers, acts.n_experts)
    sums = {name: zeros(name, shape, 0) for name in names_of(wanted) if not _peak(name)}
    table = acts.tokens()
    sample = table["sample"].to_numpy().astype(np.int64)
    tokens = Tokens(part[sample], table["token_id"].to_numpy(), table["position"].to_numpy())
    for row, layer in enumerate(acts.layers):
        here = {name: value[:, row : row + 1] for name, value in sums.items()}
        routing = _routing(acts.layer(layer), norms="norms" in wanted)
        tally(names, tokens, [routing], acts.n_experts, wanted, Tallies(names, here))
    return Tallies(names, sums)


def _peak(name: str) -> bool:
    return SUMS[name].group == "norms" and SUMS[name].join != "add"


def _routing(table: LayerTable, *, norms: bool) -> Routing:
    return Routing(table.expert, table.weight, table.norm if norms else None)
