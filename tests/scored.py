"""Scores as tests write them down, and plans that may not be possible."""

import numpy as np

from moecollab.criteria.scores import Scores
from moecollab.errors import PlanError
from moecollab.pruning.planning import plan


def make_scores(values, top_k=1, groups=None, *, layers=None, **others):
    """Scores of a recording in which every expert served one token."""
    values = np.asarray(values, dtype=np.float64)
    about = {"criterion": "frequency", "activations": "0123456789abcdef"} | others
    return Scores(
        values=values,
        counts=np.ones(values.shape, dtype=np.int64),
        layers=tuple(layers or range(len(values))),
        top_k=top_k,
        groups=groups,
        **about,
    )


def planned(scores, **asked):
    """The plan, or None where the budget cannot be met."""
    try:
        return plan(scores, **asked)
    except PlanError:
        return None
