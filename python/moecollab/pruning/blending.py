"""Scores for several domains at once, from the scores for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError, PlanError, SettingsError, ShapeError
from moecollab.manifest import refuse_existing
from moecollab.pruning.budgets import Budget
from moecollab.pruning.planning import decide

How: TypeAlias = Literal["sum", "fair"]
_ROUNDS = 200
_EVEN = 1e-9
"""How near the worst domain comes to what no set can beat before the search ends."""


def blend(
    scores: Sequence[Scores | str | PathLike[str]],
    *,
    how: How = "sum",
    weights: Sequence[float] | None = None,
    drop: float | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores for several domains together, each divided by its sum over the layer first.

    Parameters
    ----------
    scores : sequence of Scores or paths
        Scores of the same model for each domain, as ``score(…, domains=["law"])`` makes them, or by
        several criteria; none negative.
    how : {"sum", "fair"}
        "sum" adds the shares, as EASY-EP does for several domains (arXiv:2504.06792). "fair" adds
        them with weights that raise the least share of its scores that any domain keeps, under a
        plan with this `drop` in each layer.
    weights : sequence of float, optional
        One weight ≥ 0 per domain for "sum"; all alike if None.
    drop : float, optional
        Fraction of experts that will go, in [0, 1); needed for "fair", whose scores hold for it
        alone.
    out : path, optional
        Parquet file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Scores
        Their settings hold the weights, and for "fair" the least share kept and its upper bound
        over all plans.

    Raises
    ------
    ShapeError
        When the scores are not of the same model.
    DataError
        When a score is negative, so that there are no shares.
    PlanError
        When scores hold for different `drop`, or for another than that given; or, for "fair", when
        a plan with this `drop` would leave fewer experts than the router selects.
    """
    if how not in get_args(How):
        raise SettingsError("how", how, "'sum' or 'fair'")
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    found = [one if isinstance(one, Scores) else load_scores(one) for one in scores]
    _check_alike(found)
    shares = np.stack([_shares(one) for one in found])
    settings: dict[str, object] = {"how": how, "of": [_name(one) for one in found]}
    if how == "fair":
        if weights is not None or drop is None:
            raise SettingsError("how", how, "given with drop and without weights")
        budget = Budget(drop=drop)
        fair = fairest(shares, _Cut(found[0], budget))
        settings |= _made_for(found, budget.drop) | {"least_kept": fair.least, "bound": fair.bound}
        chosen = fair.weights
    else:
        settings |= _made_for(found, None)
        chosen = _checked(weights, len(found))
    settings["weights"] = chosen.tolist()
    named = {one.criterion for one in found}
    digests = {one.activations for one in found}
    made = Scores(
        criterion=named.pop() if len(named) == 1 else "blend",
        values=np.tensordot(chosen, shares, axes=1),
        counts=np.sum([one.counts for one in found], axis=0),
        layers=found[0].layers,
        top_k=found[0].top_k,
        activations=digests.pop() if len(digests) == 1 else None,
        settings=settings,
        groups=found[0].groups,
        experts_per_layer=found[0].experts_per_layer,
    )
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


@dataclass(frozen=True)
class Fair:
    """Weights of domains, and what the worst of them keeps.

    Parameters
    ----------
    weights : float64 array of shape (n_domains,)
        They add up to 1.
    least : float
        Share of its scores that the worst domain keeps, mean over the layers.
    bound : float
        What the worst domain keeps at most under any plan, to rounding.
    """

    weights: NDArray[np.float64]
    least: float
    bound: float


@dataclass(frozen=True)
class _Cut:
    """What a plan with one drop in each layer keeps of some scores."""

    scores: Scores
    budget: Budget

    def keeps(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which experts stay, (n_layers, n_experts).

        Raises
        ------
        PlanError
            When layers would keep fewer experts than the router selects.
        """
        return decide(replace(self.scores, values=values), self.budget)


def fairest(shares: NDArray[np.float64], cut: _Cut) -> Fair:
    """The weights under which the worst domain keeps most, of those that the search visits.

    max over sets of the least kept share is at most min over weights of the largest weighted share
    that a set keeps (Lagrange). That minimum is found by cutting planes: a linear programme over
    the sets seen so far gives the next weights, their best set is seen next. It ends when the bound
    is reached, or where no new set turns up, and then looks around there. With sets of whole
    experts the two may differ a little, and not every set is the best under some weights.

    Parameters
    ----------
    shares : float64 array of shape (n_domains, n_layers, n_experts)
        Shares that add up to 1 in each layer.
    cut : _Cut
        The plan that will be made.
    """
    n_domains, n_layers = shares.shape[:2]

    def kept(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = cut.keeps(np.tensordot(weights, shares, axes=1))
        masses: NDArray[np.float64] = (shares * found).sum(axis=(1, 2)) / n_layers
        return masses

    weights = np.full(n_domains, 1 / n_domains)
    seen: list[NDArray[np.float64]] = []
    tried: list[NDArray[np.float64]] = []
    least, bound = -1.0, 1.0
    for _ in range(_ROUNDS):
        tried.append(weights)
        seen.append(kept(weights))
        bound = min(bound, float(weights @ seen[-1]))
        least = max(least, float(seen[-1].min()))
        lowest, weights = _next_weights(np.stack(seen))
        if bound - max(lowest, least) <= _EVEN:
            break
    for near in _around(weights):
        tried.append(near)
        seen.append(kept(near))
    best = int(np.argmax([masses.min() for masses in seen]))
    return Fair(tried[best], float(seen[best].min()), bound)


def _around(weights: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Weights a little nearer to each domain: at the minimum itself sets tie."""
    steps = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)
    ends = np.eye(len(weights))
    return [(1 - step) * weights + step * end for step in steps for end in ends]


def _next_weights(masses: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The weights for which the best of some sets keeps least, and what it keeps then."""
    from scipy.optimize import linprog

    n_sets, n_domains = masses.shape
    found = linprog(
        c=np.append(np.zeros(n_domains), 1.0),
        A_ub=np.column_stack((masses, -np.ones(n_sets))),
        b_ub=np.zeros(n_sets),
        A_eq=np.append(np.ones(n_domains), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * n_domains + [(None, None)],
    )
    weights = np.maximum(found.x[:-1], 0.0)
    return float(found.fun), weights / weights.sum()


def _shares(scores: Scores) -> NDArray[np.float64]:
    """Shares of each layer's sum; those of a layer of zeros are alike."""
    if scores.values.min() < 0:
        raise DataError(
            f"{scores.criterion} scores as low as {scores.values.min():g} have no shares to blend; "
            "choose a criterion whose scores are not negative"
        )
    total = scores.values.sum(axis=1, keepdims=True)
    even = scores.present / scores.present.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(scores.values, total, out=even, where=total > 0)
    return shares


def _check_alike(found: Sequence[Scores]) -> None:
    if not found:
        raise DataError("there are no scores to blend; give those of at least one domain")
    first = found[0]
    for other in found[1:]:
        alike = (other.layers, other.counts_of_experts, other.top_k, other.groups)
        if alike != (first.layers, first.counts_of_experts, first.top_k, first.groups):
            raise ShapeError(
                f"{other!r} and {first!r} are not of the same layers, experts and top_k; blend "
                "scores of one model"
            )


def _checked(weights: Sequence[float] | None, n_domains: int) -> NDArray[np.float64]:
    chosen = np.ones(n_domains) if weights is None else np.asarray(weights, dtype=np.float64)
    valid = chosen.shape == (n_domains,) and np.isfinite(chosen).all() and chosen.min() >= 0
    if not valid or not chosen.any():
        raise SettingsError("weights", weights, f"{n_domains} numbers ≥ 0, not all 0")
    return chosen


def _made_for(found: Sequence[Scores], drop: float | None) -> dict[str, float]:
    """The drop that the result holds for, where some scores or a fair blend hold for one alone."""
    known = [one.settings.get("drop") for one in found] + [drop]
    drops = sorted({float(one) for one in known if isinstance(one, float | int)})
    if len(drops) > 1:
        named = " and ".join(f"{one:g}" for one in drops)
        raise PlanError(
            f"these scores and their blend hold for drop={named}; score and blend with one drop"
        )
    return {"drop": drops[0]} if drops else {}


def _name(scores: Scores) -> str:
    domains = scores.settings.get("domains")
    return ",".join(map(str, domains)) if isinstance(domains, list) else scores.criterion
