"""Which experts a plan drops, and what speaks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores
from moecollab.pruning.plans import Plan
from moecollab.pruning.sites import site_mask
from moecollab.reporting.expert_use import ExpertUse

Site = tuple[int, int]


@dataclass(frozen=True)
class DroppedExpert:
    """One row of the table of dropped experts."""

    layer: int
    expert: int
    score: float
    use: float | None
    """Share of its layer's routed weight, if activations are given."""
    leaning: str
    """Domain that it prefers, or nothing."""
    patterns: tuple[str, ...]
    """Names of the patterns it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Drops:
    """A plan beside the scores it was made from.

    Parameters
    ----------
    criterion : str
        What the experts were ranked by.
    layers : tuple of int
        The model's own indices of the MoE layers.
    scores : float64 array of shape (n_layers, n_experts)
        Higher is kept.
    gone : bool array of shape (n_layers, n_experts)
        Which experts are dropped.
    stays : bool array of shape (n_layers, n_experts)
        Which experts are kept; where layers have different numbers, some sites are neither.
    use : ExpertUse, optional
        How much each expert is used.
    membership : mapping of (layer, expert) to names
        Patterns that each expert belongs to.
    """

    criterion: str
    layers: tuple[int, ...]
    scores: NDArray[np.float64]
    gone: NDArray[np.bool_]
    stays: NDArray[np.bool_]
    use: ExpertUse | None = None
    membership: Mapping[Site, tuple[str, ...]] = field(default_factory=dict)

    def expert(self, row: int, expert: int) -> DroppedExpert:
        """All that is known of one expert; `row` counts the MoE layers."""
        layer = self.layers[row]
        leaning = -1 if self.use is None else int(self.use.leaning[row, expert])
        return DroppedExpert(
            layer=layer,
            expert=int(expert),
            score=float(self.scores[row, expert]),
            use=None if self.use is None else float(self.use.overall[row, expert]),
            leaning=self.use.domains[leaning] if self.use is not None and leaning >= 0 else "",
            patterns=self.membership.get((layer, int(expert)), ()),
        )

    def rows(self) -> list[DroppedExpert]:
        """The dropped experts, layer by layer, the lowest score first."""
        found = [self.expert(row, expert) for row, expert in np.argwhere(self.gone)]
        return sorted(found, key=lambda one: (one.layer, one.score, one.expert))

    def note(self, row: int, expert: int) -> str:
        """What hovering over one expert says; no text of the corpus."""
        one = self.expert(row, expert)
        lines = [
            f"<b>Layer {one.layer}, expert {one.expert}</b>",
            f"{'dropped' if self.gone[row, expert] else 'kept'}, score {one.score:.4g}",
        ]
        if one.use is not None:
            lines.append(f"{100 * one.use:.2f} % of the layer's weight")
        if one.patterns:
            lines.append(f"in patterns {', '.join(one.patterns[:6])}")
        return "<br>".join(lines)

    @property
    def use_lost(self) -> float | None:
        """Share of all routed weight that went to the dropped experts."""
        if self.use is None:
            return None
        return float(self.use.overall[self.gone].sum() / self.use.overall.sum())


def drops_of(
    plan: Plan,
    scores: Sequence[Scores],
    use: ExpertUse | None,
    membership: Mapping[Site, tuple[str, ...]],
) -> Drops | None:
    """The plan with its scores, or None when no scores are known."""
    values = _values(plan, scores)
    if values is None:
        return None
    gone, stays = (
        site_mask(sites, plan.layers, values.shape[1]) for sites in (plan.dropped, plan.keep)
    )
    return Drops(
        criterion=plan.criterion,
        layers=plan.layers,
        scores=values,
        gone=gone,
        stays=stays,
        use=use,
        membership=membership,
    )


def _values(plan: Plan, scores: Sequence[Scores]) -> NDArray[np.float64] | None:
    """The plan's own scores, or else those of the same criterion."""
    if plan.scores is not None:
        return np.asarray(plan.scores, dtype=np.float64)
    for found in scores:
        if found.criterion == plan.criterion and found.layers == plan.layers:
            return found.values
    return None
