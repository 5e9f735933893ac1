"""How criteria stand to each other: costs, paired intervals, and ranks with their noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import unknown_name
from moecollab.evaluation.intervals import RESAMPLES, Interval, percentiles

STANDINGS = {
    "per": pl.String,
    "drop": pl.Float64,
    "criterion": pl.String,
    "cost": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "rank": pl.Float64,
    "critical": pl.Float64,
}
LEVEL = 0.05


class Measured(Protocol):
    """What standings are made from."""

    @property
    def cells(self) -> pl.DataFrame:
        """A row per seed, criterion, budget and share."""

    @property
    def values(self) -> pl.DataFrame:
        """A row per cut, measure and item."""

    @property
    def measures(self) -> list[str]:
        """What was measured."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is asked of a comparison.

    Parameters
    ----------
    measure : str
        The loss, or a task with its metric.
    reference : str or None
        Criterion that the others are held against; the best if None.
    seed : int
        Seed of the resampling.
    """

    measure: str
    reference: str | None
    seed: int


@dataclass(frozen=True)
class Block:
    """One budget and share: how much worse each criterion's cut is on each item.

    Parameters
    ----------
    criteria : list of str
        Names.
    worse : float64 array of shape (n_criteria, n_seeds, n_items)
        In nats or answers, summed over the item.
    size : float64 array of shape (n_items,)
        Tokens or questions of each item.
    domain : int64 array of shape (n_items,)
        Number of each item's domain, from 0.
    """

    criteria: list[str]
    worse: NDArray[np.float64]
    size: NDArray[np.float64]
    domain: NDArray[np.int64]

    def costs(self) -> NDArray[np.float64]:
        """Mean cost of each criterion a token or question: shape (n_criteria,)."""
        total: NDArray[np.float64] = self.worse.mean(axis=1).sum(axis=1)
        return total / float(self.size.sum())

    def draws(self, seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
        """Costs with seeds and items drawn again, alike for all criteria.

        Items are drawn within their domain, as many as there are.

        Returns
        -------
        float64 array of shape (resamples, n_criteria)
        """
        rng = np.random.default_rng(seed)
        items = np.zeros((resamples, len(self.size)))
        for domain in np.unique(self.domain):
            own = np.flatnonzero(self.domain == domain)
            items[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples)
        n_seeds = self.worse.shape[1]
        seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples) / n_seeds
        summed = np.einsum("csi,ri->rcs", self.worse, items, optimize=True)
        found: NDArray[np.float64] = np.einsum("rcs,rs->rc", summed, seeds)
        sizes: NDArray[np.float64] = items @ self.size
        return found / sizes[:, None]

    def ranks(self) -> tuple[NDArray[np.float64], float]:
        """Mean rank of each criterion over domains, and the critical difference.

        Costs are averaged over seeds and summed within a domain; of equals all take the mean of
        their ranks. Two criteria whose mean ranks differ by less than the critical difference are
        not told apart at 5 % (Nemenyi's test; Demšar 2006, eq. 3.2); not a number for one domain
        or criterion.
        """
        from scipy.stats import rankdata

        domains = np.unique(self.domain)
        mean = self.worse.mean(axis=1)
        table = np.stack([mean[:, self.domain == d].sum(axis=1) for d in domains], axis=1)
        ranks: NDArray[np.float64] = rankdata(table, axis=0).mean(axis=1)
        return ranks, critical_difference(len(self.criteria), len(domains))


def critical_difference(n_criteria: int, n_blocks: int) -> float:
    """Least difference of mean ranks that Nemenyi's test tells apart at 5 %.

    Examples
    --------
    >>> round(critical_difference(4, 14), 2)  # Demšar 2006, section 3.2.4, rounds q to 2.569
    1.25
    """
    if n_criteria < 2 or n_blocks < 2:
        return math.nan
    from scipy.stats import studentized_range

    q = studentized_range.ppf(1 - LEVEL, n_criteria, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(n_criteria * (n_criteria + 1) / (6 * n_blocks)))


def standings(found: Measured, asked: Standing) -> pl.DataFrame:
    """A row per budget, share and criterion; see :meth:`Comparison.standings`."""
    if asked.measure not in found.measures:
        raise unknown_name("measure", asked.measure, found.measures)
    names = found.cells["criterion"].unique(maintain_order=True).to_list()
    if asked.reference is not None and asked.reference not in names:
        raise unknown_name("reference", asked.reference, names)
    values = found.values.filter(pl.col("measure") == asked.measure)
    rows: list[dict[str, Any]] = []
    for (per, drop), cells in found.cells.group_by("per", "drop", maintain_order=True):
        block = _block(cells, values, names)
        rows += [{"per": per, "drop": drop} | row for row in _rows(block, asked)]
    return pl.DataFrame(rows, schema=STANDINGS)


def _block(cells: pl.DataFrame, values: pl.DataFrame, names: list[str]) -> Block:
    """The cells of one budget and share as arrays."""
    by_cut = {str(cut): part for (cut,), part in values.group_by("cut", maintain_order=True)}
    seeds = cells["seed"].unique().sort().to_list()
    cut = {(row["criterion"], row["seed"]): row["cut"] for row in cells.iter_rows(named=True)}
    worse = [[by_cut[cut[name, seed]]["worse"].to_numpy() for seed in seeds] for name in names]
    one = by_cut[cells["cut"][0]]
    domain = one["domain"].rank("dense").to_numpy().astype(np.int64) - 1
    return Block(names, np.asarray(worse, np.float64), one["size"].to_numpy(), domain)


def _rows(block: Block, asked: Standing) -> Iterator[dict[str, Any]]:
    """A row per criterion, the best first."""
    costs, draws = block.costs(), block.draws(asked.seed)
    ranks, critical = block.ranks()
    order = np.argsort(costs, kind="stable")
    held = block.criteria.index(asked.reference) if asked.reference else int(order[0])
    for at in order.tolist():
        low, high = percentiles(draws[:, at])
        same = at == held
        gap = Interval(0.0, 0.0) if same else percentiles(draws[:, at] - draws[:, held])
        yield {
            "criterion": block.criteria[at],
            "cost": float(costs[at]),
            "low": low,
            "high": high,
            "difference": float(costs[at] - costs[held]),
            "difference_low": gap.low,
            "difference_high": gap.high,
            "rank": float(ranks[at]),
            "critical": critical,
        }
