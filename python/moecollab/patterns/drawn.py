"""Patterns as other documents would use them, the dictionary as it was fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moecollab.errors import ShapeError
from moecollab.patterns.blocks import use_of
from moecollab.patterns.collaboration import Collaboration, Level
from moecollab.record.activations import Activations
from moecollab.record.drawn import Drawn


def used_by(collab: Collaboration, drawn: Drawn) -> Collaboration:
    """The patterns with the codes, usage and peaks of documents that were drawn.

    Atoms and links are those of the fit, which is not made again. At finer levels usage follows
    the links, and the peak of an atom is its largest part in an atom above that is still used.

    Parameters
    ----------
    collab : Collaboration
        Fitted on the source of the draw.
    drawn : Drawn
        The documents.
    """
    rows = drawn.token if collab.settings["rows"] == "token" else drawn.document
    codes = collab.codes.take(rows)
    first = collab.levels[0]
    levels = [replace(first, **use_of(codes, len(first.atoms)))]
    for level in collab.levels[1:]:
        levels.append(_below(level, levels[-1]))
    return replace(collab, levels=tuple(levels), codes=codes, activations=drawn.digest())


def _below(level: Level, above: Level) -> Level:
    """A finer level, used as the one above it is."""
    if level.links is None:
        return level
    used = np.where((above.peak > 0)[:, None], level.links, 0).astype(np.float64)
    return replace(level, usage=above.usage @ used, peak=used.max(axis=0, initial=0.0))


def check_rows(collab: Collaboration, acts: Activations) -> None:
    """Raises ShapeError unless the patterns hold a code for every row of the recording."""
    wanted = acts.n_tokens if collab.settings["rows"] == "token" else acts.n_samples
    if collab.n_rows != wanted:
        raise ShapeError(
            f"the collaboration holds codes of {collab.n_rows} rows, but {acts.path} has {wanted}; "
            "fit it on this recording, on all of its rows"
        )
