"""What a reader of a comparison must know beside the numbers, in plain words."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from moecollab.errors import CalibrationWarning
from moecollab.evaluation.comparing.grid import Grid, drawn
from moecollab.evaluation.comparing.standing import critical_difference

if TYPE_CHECKING:
    from moecollab.evaluation.comparing.standing import Measured
    from moecollab.record.corpus import Corpus

_FEW = 4
"""Names that a sentence holds at most."""


def rank_note(n_criteria: int, n_domains: int) -> str:
    """How far mean ranks over domains can be trusted.

    Examples
    --------
    >>> rank_note(4, 14)
    'Mean ranks that differ by less than 1.25 are not told apart (Nemenyi, 5 %, 14 domains).'
    >>> rank_note(4, 2)
    'Mean ranks over 2 domains are not told apart, however far they lie; it takes 3 or more.'
    """
    if n_criteria < 2:
        return "There is one criterion, so there are no ranks to tell apart."
    if n_domains < 2:
        return "There is one domain, so ranks cannot be told apart; look at the differences."
    critical = critical_difference(n_criteria, n_domains)
    if critical > n_criteria - 1:
        least = math.ceil(n_domains * (critical / (n_criteria - 1)) ** 2)
        return (
            f"Mean ranks over {n_domains} domains are not told apart, however far they lie; "
            f"it takes {least} or more."
        )
    return (
        f"Mean ranks that differ by less than {critical:.2f} are not told apart "
        f"(Nemenyi, 5 %, {n_domains} domains)."
    )


def notes(found: Measured, about: Mapping[str, Any], measure: str) -> list[str]:
    """Sentences for the foot of a table: about ranks, then about seeds.

    Parameters
    ----------
    found : Comparison
        What was measured.
    about : mapping
        Its manifest; what it does not say gets no sentence.
    measure : str
        One of its measures.
    """
    values = found.values.filter(pl.col("measure") == measure)
    n_criteria = found.cells["criterion"].n_unique()
    said = [rank_note(n_criteria, values["domain"].n_unique())]
    if found.cells["seed"].n_unique() < 2:
        said.append(
            "There is one calibration, so the intervals speak of other held-out text alone, not of "
            "other calibration text; give two seeds or more."
        )
    calibration = about.get("measured", {}).get("calibration", {})
    said += _alike_note(calibration.get("alike", []), calibration.get("domains", 0))
    return said + _same_cuts_note(found, calibration)


def alike(grid: Grid, corpus: Corpus) -> list[str]:
    """Domains of which every seed draws all documents; none where there is one seed."""
    count = Counter(document.domain for document in corpus.documents)
    whole = [name for name in corpus.domains if drawn(count[name], grid.share) == count[name]]
    return whole if grid.seeds > 1 else []


def warn_alike(grid: Grid, corpus: Corpus) -> None:
    """Warns, once a run, when seeds calibrate on the same documents."""
    names, n_domains = alike(grid, corpus), len(corpus.domains)
    if not names:
        return
    said = _alike_note(names, n_domains)
    if len(names) == n_domains and not any(entry.draws for entry in grid.entries()):
        said.append("None of these criteria depends on the seed otherwise: one says as much.")
    warnings.warn(" ".join(said), CalibrationWarning, stacklevel=2)


def _alike_note(names: Sequence[str], n_domains: int) -> list[str]:
    """That intervals lack what another choice of documents would change."""
    if not names:
        return []
    if len(names) == n_domains:
        return [
            "Every seed calibrates on the same documents, so the intervals do not hold what other "
            "calibration text would change; give more documents or a smaller share."
        ]
    shown = ", ".join(names[:_FEW]) + (" …" if len(names) > _FEW else "")
    return [
        f"Every seed calibrates on the same documents in {len(names)} of {n_domains} domains "
        f"({shown}), so the intervals are too narrow; give more documents of these."
    ]


def _same_cuts_note(found: Measured, calibration: Mapping[str, Any]) -> list[str]:
    """Which criteria cut the same in every seed, where documents give no reason to differ."""
    names = calibration.get("alike", [])
    if not names or len(names) < calibration.get("domains", 0):
        return []
    cuts = found.cells.group_by("criterion", "per", "drop", maintain_order=True).agg(
        pl.col("cut").n_unique()
    )
    most = cuts.group_by("criterion", maintain_order=True).agg(pl.col("cut").max())
    same = most.filter(pl.col("cut") == 1)["criterion"].to_list()
    return [f"All seeds made the same cuts by {', '.join(same)}."] if same else []
