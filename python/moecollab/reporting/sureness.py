"""How sure the choice of experts is, and how far criteria agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores
from moecollab.criteria.spread import Spread
from moecollab.pruning.budgets import Budget
from moecollab.pruning.planning import decide
from moecollab.pruning.plans import Plan
from moecollab.pruning.rankings import agreement

CERTAIN = 0.95
"""Share of the draws from which on we call an expert sure to stay, or to go."""


@dataclass(frozen=True)
class Sureness:
    """Scores with a spread, in the words and the order of the page.

    Parameters
    ----------
    scores : Scores
        What was resampled.
    spread : Spread
        What the draws say.
    """

    scores: Scores
    spread: Spread

    @property
    def criterion(self) -> str:
        """What experts were ranked by."""
        return self.scores.criterion

    @property
    def staying(self) -> int:
        """Experts that nearly every draw keeps."""
        return int((self.spread.kept_probability[self.scores.present] >= CERTAIN).sum())

    @property
    def going(self) -> int:
        """Experts that nearly every draw drops."""
        return int((self.spread.kept_probability[self.scores.present] <= 1 - CERTAIN).sum())

    @property
    def open(self) -> int:
        """Experts that depend on the documents."""
        return self.scores.n_sites - self.staying - self.going

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Experts of each layer, the surest to stay first: int64 (n_layers, n_experts)."""
        ids = np.broadcast_to(np.arange(self.scores.n_experts), self.scores.values.shape)
        by_layer = (ids, -self.scores.values, -self.spread.kept_probability, ~self.scores.present)
        return np.lexsort(by_layer, axis=1)

    @cached_property
    def n_kept(self) -> NDArray[np.int64]:
        """Experts that each layer keeps of all documents: int64 (n_layers,)."""
        kept = decide(self.scores, Budget.from_json(self.spread.budget))
        return np.asarray(kept.sum(axis=1), dtype=np.int64)


def sureness_of(scores: Sequence[Scores], plan: Plan | None) -> tuple[Sureness, ...]:
    """What was resampled, that of the plan first."""
    found = [Sureness(one, one.spread) for one in scores if one.spread is not None]
    return tuple(sorted(found, key=lambda one: not _of_plan(one, plan)))


def _of_plan(one: Sureness, plan: Plan | None) -> bool:
    asked = None if plan is None else plan.budget or Budget(drop=plan.drop, per=plan.per)
    return plan is not None and (one.criterion, dict(one.spread.budget)) == (
        plan.criterion,
        asked.as_json() if asked is not None else None,
    )


@dataclass(frozen=True)
class Agreement:
    """Every two criteria side by side.

    Parameters
    ----------
    table : DataFrame
        As :func:`moecollab.agreement` gives it.
    drop : float
        Share of every layer's experts that the plans compared drop.
    """

    table: pl.DataFrame
    drop: float

    @property
    def chance(self) -> float:
        """About how much two random choices have in common: (1 - drop) / (1 + drop)."""
        return (1 - self.drop) / (1 + self.drop)


def agreement_of(scores: Sequence[Scores], plan: Plan | None) -> Agreement | None:
    """The criteria compared at what the plan drops; None unless there are two."""
    drop = 0.5 if plan is None else round(plan.drop, 9)
    fitting: dict[str, Scores] = {}
    for one in scores:
        if one.settings.get("drop", drop) == drop and "domains" not in one.settings:
            fitting.setdefault(one.criterion, one)
    shapes = {(one.layers, one.counts_of_experts) for one in fitting.values()}
    if len(fitting) < 2 or len(shapes) > 1:
        return None
    return Agreement(agreement(list(fitting.values()), drop=drop), drop)
