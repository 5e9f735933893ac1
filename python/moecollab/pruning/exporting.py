"""What engines read that prune while they load: ranked lists of experts."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError
from moecollab.manifest import write_bytes
from moecollab.pruning.plans import Plan, load_plan

Ranked: TypeAlias = dict[int, tuple[int, ...]]
"""Expert ids of every layer, best first."""


def export_ranking(
    ranked: Scores | Plan | str | PathLike[str],
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> Ranked:
    """Writes the experts of every layer, best first, as JSON lines for engines that prune on load.

    A line is ``{"<layer>": [ids]}`` with all experts of the layer, as the list that vLLM-Ascend's
    pull request 12525 reads beside a share to drop. An engine that keeps the first of each line
    keeps what the plan does, if the plan keeps equally many in every layer.

    Parameters
    ----------
    ranked : Scores, Plan or path
        Scores rank by themselves, equal ones by id; a plan puts those that stay first.
    out : path
        File for the lines.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    dict of int to tuple of int
        What was written.

    Raises
    ------
    DataError
        When the file is neither scores nor a plan.
    """
    if isinstance(ranked, str | PathLike):
        ranked = load_scores(ranked) if Path(ranked).suffix == ".parquet" else load_plan(ranked)
    order = _of_plan(ranked) if isinstance(ranked, Plan) else _of_scores(ranked)
    lines = (json.dumps({str(layer): list(ids)}) + "\n" for layer, ids in order.items())
    write_bytes(Path(out), "".join(lines).encode(), overwrite=overwrite)
    return order


def load_ranking(path: str | PathLike[str]) -> Ranked:
    """The ranked lists in a file of JSON lines.

    Raises
    ------
    DataError
        When a line is not one layer's list of distinct ids.
    """
    found: Ranked = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            ((layer, ids),) = json.loads(line).items()
            place, ranked = int(layer), _distinct(ids)
        except (ValueError, TypeError, AttributeError) as cause:
            raise DataError(
                f'line {number} of {path} is not {{"<layer>": [distinct ids]}}; export it again'
            ) from cause
        found[place] = ranked
    return found


def _distinct(ids: object) -> tuple[int, ...]:
    """A list of ids as a tuple, or ValueError."""
    if not isinstance(ids, list) or any(type(one) is not int for one in ids):
        raise ValueError(ids)
    if len(set(ids)) < len(ids) or any(one < 0 for one in ids):
        raise ValueError(ids)
    return tuple(ids)


def _of_scores(scores: Scores) -> Ranked:
    layers = zip(scores.layers, scores.values, scores.counts_of_experts, strict=True)
    return {
        layer: tuple(np.argsort(-row[:count], kind="stable").tolist())
        for layer, row, count in layers
    }


def _of_plan(plan: Plan) -> Ranked:
    found = {}
    for place, (layer, kept) in enumerate(plan.keep.items()):
        count = plan.counts[layer]
        worth = np.zeros(count) if plan.scores is None else plan.scores[place, :count]
        stays = np.isin(np.arange(count), kept)
        found[layer] = tuple(np.lexsort((-worth, ~stays)).tolist())  # the last key decides first
    return found
