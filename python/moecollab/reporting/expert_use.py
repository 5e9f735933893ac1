"""How much each expert is used, over all text and in each domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.models.widths import present
from moecollab.record.activations import Activations

ENOUGH = 20
"""Times an expert must be chosen before we say which domain it leans to."""


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """Shares of routed weight.

    Parameters
    ----------
    layers : tuple of int
        The model's own indices of the MoE layers.
    domains : tuple of str
        Domains of the text.
    overall : float64 array of shape (n_layers, n_experts)
        Share of each layer's routed weight that goes to each expert, over all text.
    by_domain : float64 array of shape (n_domains, n_layers, n_experts)
        The same within each domain.
    counts : int64 array of shape (n_layers, n_experts)
        Tokens for which each expert was chosen.
    present : bool array of shape (n_layers, n_experts), optional
        Which of them are experts, where layers have different numbers; all if None.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    overall: NDArray[np.float64]
    by_domain: NDArray[np.float64]
    counts: NDArray[np.int64]
    present: NDArray[np.bool_] | None = None

    @property
    def held(self) -> NDArray[np.bool_]:
        """Which sites are experts: bool array of shape (n_layers, n_experts)."""
        return np.ones(self.counts.shape, np.bool_) if self.present is None else self.present

    @property
    def n_experts(self) -> int:
        """Experts per layer; the most that one has where layers differ."""
        return int(self.overall.shape[1])

    @cached_property
    def lift(self) -> NDArray[np.float64]:
        """Share within a domain over share in all text; 1 means no preference, 0 if too rare."""
        known = (self.counts >= ENOUGH) & (self.overall > 0)
        safe = np.where(known, self.overall, 1.0)
        return np.where(known, self.by_domain / safe, 0.0)

    @cached_property
    def leaning(self) -> NDArray[np.int64]:
        """Domain that each expert prefers, or -1 if it was chosen too rarely to say."""
        best = self.lift.argmax(axis=0)
        return np.where(self.lift.max(axis=0) > 0, best, -1).astype(np.int64)

    def busiest(self, fraction: float) -> float:
        """Share of all routed weight that goes to the busiest experts of the model."""
        ordered = np.sort(self.overall[self.held])[::-1]
        taken = ordered[: max(1, round(fraction * ordered.size))]
        return float(taken.sum() / ordered.sum())

    @cached_property
    def divergence(self) -> NDArray[np.float64]:
        """How differently the domains route: float64 array of shape (n_layers,), in [0, 1].

        Jensen–Shannon divergence between the domains of a layer's expert shares, each domain
        counting alike, over its greatest possible value: 0 when all domains use the same experts,
        1 when no two share one.
        """
        if len(self.domains) < 2:
            return np.zeros(len(self.layers))
        mixed = _entropy(self.by_domain.mean(axis=0))
        found = mixed - _entropy(self.by_domain).mean(axis=0)
        return np.asarray(found / np.log(len(self.domains)), dtype=np.float64)


def expert_use(acts: Activations) -> ExpertUse:
    """Use of each expert, from the sums that `extract` recorded."""
    tallies = acts.tallies()
    weight = np.asarray(tallies.sum_weight, dtype=np.float64)
    return ExpertUse(
        layers=tuple(acts.layers),
        domains=tuple(acts.domains),
        overall=_shares(weight.sum(axis=0)),
        by_domain=_shares(weight),
        counts=np.asarray(tallies.count, dtype=np.int64).sum(axis=0),
        present=present(acts.experts_per_layer, acts.n_experts),
    )


def token_shares(acts: Activations) -> dict[str, float]:
    """Share of the recorded tokens that each domain makes up."""
    samples = acts.samples().group_by("domain").agg(pl.col("n_tokens").sum())
    counts = dict(zip(samples["domain"].to_list(), samples["n_tokens"].to_list(), strict=True))
    total = max(1, sum(counts.values()))
    return {domain: counts.get(domain, 0) / total for domain in acts.domains}


def shown_domains(domains: Sequence[str], shares: dict[str, float], most: int) -> tuple[str, ...]:
    """The domains with most text, in their own order; a page cannot show hundreds."""
    largest = sorted(domains, key=lambda name: -shares.get(name, 0.0))[:most]
    return tuple(name for name in domains if name in set(largest))


def _shares(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    total = weight.sum(axis=-1, keepdims=True)
    return weight / np.where(total > 0, total, 1.0)


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    safe = np.where(shares > 0, shares, 1.0)
    return np.asarray(-(shares * np.log(safe)).sum(axis=-1), dtype=np.float64)
