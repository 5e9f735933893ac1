"""How alike criteria, seeds or texts rank the experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from os import PathLike
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError, ShapeError
from moecollab.manifest import refuse_existing
from moecollab.pruning.budgets import Budget, Per
from moecollab.pruning.planning import check_made_for, decide
from moecollab.pruning.resampling import jaccard


def agreement(
    scores: Sequence[Scores | str | PathLike[str]],
    *,
    drop: float = 0.5,
    per: Per = "layer",
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> pl.DataFrame:
    """Every two of some scores side by side: rank correlations, and how alike their plans are.

    Parameters
    ----------
    scores : sequence of Scores or paths
        At least two, of one model: other criteria, seeds, texts or domains.
    drop, per
        The plan whose kept experts are compared, as :func:`moecollab.plan` takes them.
    out : path, optional
        Parquet file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    DataFrame
        first and second (names of files, or of criteria), spearman and kendall (tau-b), means over
        the layers in which neither is constant, null where there is none; jaccard, the mean over
        layers of the Jaccard index of the kept experts.

    Raises
    ------
    PlanError
        When scores hold for another `drop`, as those of ``caep`` do, or the budget cannot be met.
    """
    budget = Budget(drop=drop, per=per)
    budget.check_scores_suffice("where plans are compared")
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    found = [one if isinstance(one, Scores) else load_scores(one) for one in scores]
    if len(found) < 2:
        raise DataError(f"{len(found)} scores have nothing to agree with; give two or more")
    if len({(one.layers, one.counts_of_experts) for one in found}) > 1:
        raise ShapeError(
            "the scores are not of the same layers and experts; give those of one model"
        )
    names = _names(scores, found)
    for one in found:
        check_made_for(one, drop)
    kept = [decide(one, budget) for one in found]
    rows = [
        {
            "first": names[one],
            "second": names[other],
            "spearman": _spearman(_rows(found[one]), _rows(found[other])),
            "kendall": _kendall(_rows(found[one]), _rows(found[other])),
            "jaccard": float(jaccard(kept[one], kept[other]).mean()),
        }
        for one, other in combinations(range(len(found)), 2)
    ]
    table = pl.DataFrame(rows, schema_overrides={"spearman": pl.Float64, "kendall": pl.Float64})
    if out is not None:
        table.write_parquet(Path(out))
    return table


def _names(given: Sequence[Scores | str | PathLike[str]], found: Sequence[Scores]) -> list[str]:
    """Names of files, or else of criteria, numbered where they repeat."""
    plain = [
        one.criterion if isinstance(where, Scores) else Path(where).stem
        for where, one in zip(given, found, strict=True)
    ]
    return [
        name if plain.count(name) == 1 else f"{name} {plain[: at + 1].count(name)}"
        for at, name in enumerate(plain)
    ]


def _rows(scores: Scores) -> list[NDArray[np.float64]]:
    """Scores of every layer's experts."""
    layers = zip(scores.values, scores.counts_of_experts, strict=True)
    return [row[:count] for row, count in layers]


def _spearman(
    first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]]
) -> float | None:
    """Correlation of ranks, ties averaged."""
    from scipy.stats import rankdata

    found = []
    for rows in zip(first, second, strict=True):
        one, other = (rankdata(row) - (len(row) + 1) / 2 for row in rows)
        size = np.sqrt((one**2).sum() * (other**2).sum())
        if size > 0:
            found.append((one * other).sum() / size)
    return float(np.mean(found)) if found else None


def _kendall(
    first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]]
) -> float | None:
    """Kendall's tau-b."""
    from scipy.stats import kendalltau

    rows = zip(first, second, strict=True)
    found = [
        float(kendalltau(one, other).statistic)
        for one, other in rows
        if one.min() < one.max() and other.min() < other.max()
    ]
    return float(np.mean(found)) if found else None
