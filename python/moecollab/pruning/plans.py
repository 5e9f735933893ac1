"""A plan: which experts stay, why, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, MissingInputError, PlanError, SettingsError, ShapeError
from moecollab.manifest import check_manifest, manifest, read_json, write_json
from moecollab.models.groups import RouterGroups, groups_from_json
from moecollab.models.widths import counts_from_json, present
from moecollab.pruning.budgets import Budget, Per
from moecollab.pruning.sites import kept_ids, site_mask, with_number_keys, with_text_keys
from moecollab.pruning.units import make_units

KIND, FORMAT = "plan", 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which experts stay in each layer, and why.

    Parameters
    ----------
    keep : dict of int to tuple of int
        Kept expert ids of every MoE layer, ascending; at least `top_k` each.
    n_experts : int
        Routed experts per layer before anything goes; the most of one where layers differ.
    top_k : int
        Experts that the router selects per token.
    criterion : str
        What the experts were ranked by.
    drop : float
        Fraction of experts that was asked to go, in [0, 1); that went, under other budgets.
    per : {"layer", "model", "entropy", "similarity"}
        How layers share the budget; see :func:`moecollab.plan`.
    protected : dict of int to tuple of int
        Experts that had to stay.
    scores : float64 array of shape (n_layers, n_experts), optional
        What the decision was made from; needed to equalise.
    activations : str, optional
        Digest of the activations behind the scores.
    budget : Budget, optional
        What was asked for, if it was not `drop` alone.
    groups : RouterGroups, optional
        Groups that the routers choose among, which keep equal numbers of experts.
    sureness : float, optional
        Probability that an expert that stays would stay if the documents were others like them,
        mean over those that stay; known from scores with a spread under the same budget.
    experts_per_layer : tuple of int, optional
        Routed experts of every layer before anything goes, where layers differ.
    drop_list : dict of int to tuple of int
        Expert ids that had to go.
    """

    keep: dict[int, tuple[int, ...]]
    n_experts: int
    top_k: int
    criterion: str
    drop: float
    per: Per
    protected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scores: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    activations: str | None = None
    budget: Budget | None = None
    groups: RouterGroups | None = None
    sureness: float | None = None
    experts_per_layer: tuple[int, ...] | None = None
    drop_list: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the plan can be carried out."""
        Budget(drop=self.drop, per=self.per)
        if not self.keep or list(self.keep) != sorted(self.keep):
            raise PlanError("the plan's layers are empty or out of order; make it with plan()")
        counts = self.experts_per_layer
        if counts is not None and (len(counts) != len(self.keep) or max(counts) != self.n_experts):
            raise PlanError(
                f"the plan has experts_per_layer {list(counts)} for {len(self.keep)} layers of up "
                f"to {self.n_experts} experts; make it again"
            )
        for layer, kept in self.keep.items():
            _check_layer(layer, kept, self.counts[layer], self.top_k)
        for layer, held in self.protected.items():
            if not set(held) <= set(self.keep.get(layer, ())):
                raise PlanError(f"layer {layer} drops an expert it protects; make the plan again")
        for layer, listed in self.drop_list.items():
            if not set(listed) <= set(self.dropped.get(layer, ())):
                raise PlanError(f"layer {layer} keeps an expert of its drop-list; make it again")
        if self.scores is not None and self.scores.shape != (len(self.keep), self.n_experts):
            raise ShapeError(
                f"the plan has scores of shape {self.scores.shape}, expected "
                f"{(len(self.keep), self.n_experts)}; make it again"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own indices of the MoE layers."""
        return tuple(self.keep)

    @property
    def counts(self) -> dict[int, int]:
        """Routed experts of every layer before anything goes."""
        held = self.experts_per_layer or (self.n_experts,) * len(self.keep)
        return dict(zip(self.keep, held, strict=True))

    @property
    def n_sites(self) -> int:
        """Number of routed experts before anything goes."""
        return sum(self.counts.values())

    @property
    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Ids of the experts that go, of every layer, ascending."""
        return {
            layer: tuple(sorted(set(range(count)) - set(self.keep[layer])))
            for layer, count in self.counts.items()
        }

    @property
    def n_dropped(self) -> int:
        """Number of experts that go."""
        return self.n_sites - sum(len(kept) for kept in self.keep.values())

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same number of experts."""
        return len({len(kept) for kept in self.keep.values()}) == 1

    def equalised(self) -> Plan:
        """The plan with the nearest total that keeps equally many experts in every layer.

        Layers that kept more lose their lowest scores; layers that kept fewer get their highest
        back. A plan that is uniform already is returned as it is.

        Raises
        ------
        MissingInputError
            When the plan holds no scores.
        PlanError
            When a layer has fewer experts than another is to keep.
        """
        if self.uniform:
            return self
        if self.scores is None:
            raise MissingInputError(
                "the plan holds no scores, so its layers cannot be equalised; make it from scores"
            )
        n_groups, least = grouped(self.groups, self.top_k)
        counts = tuple(self.counts.values())
        units = make_units(
            self.scores,
            site_mask(self.protected, self.layers, self.n_experts),
            site_mask(self.drop_list, self.layers, self.n_experts),
            counts=counts,
            n_groups=n_groups,
            least=least,
        )
        mean = (self.n_sites - self.n_dropped) / len(self.keep) / n_groups
        left = max(math.floor(mean + 0.5), int((units.size - units.may).max()))
        left = min(left, int((units.size - units.must).min()))
        if (units.size - units.may).max() > left:
            raise PlanError(
                f"one layer has {left * n_groups} experts and another protects more, so no number "
                "is right for all; protect fewer (or shorten the drop-list, whose experts do not "
                "count), or pass uneven='native'"
            )
        kept = present(counts, self.n_experts) & ~units.gone(units.size - left)
        return replace(
            self,
            keep=kept_ids(kept, self.layers),
            drop=(self.n_sites - left * n_groups * len(counts)) / self.n_sites,
            per="layer",
            budget=None,
            sureness=None,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data, as it stands in its file."""
        settings: dict[str, Any] = {"drop": self.drop, "per": self.per, "criterion": self.criterion}
        if self.budget is not None:
            settings["budget"] = self.budget.as_json()
        inputs = {} if self.activations is None else {"activations": self.activations}
        return (
            manifest(KIND, FORMAT, settings=settings, inputs=inputs)
            | {
                "keep": with_text_keys(self.keep),
                "protected": with_text_keys(self.protected),
                "n_experts": self.n_experts,
                "top_k": self.top_k,
                "scores": None if self.scores is None else self.scores.tolist(),
            }
            | (
                {}
                if self.experts_per_layer is None
                else {"experts_per_layer": list(self.experts_per_layer)}
            )
            | ({"drop_list": with_text_keys(self.drop_list)} if self.drop_list else {})
            | ({} if self.sureness is None else {"sureness": self.sureness})
            | ({} if self.groups is None else {"router_groups": self.groups.as_json()})
        )

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the plan as JSON."""
        write_json(Path(path), self.as_json(), overwrite=overwrite)

    def __repr__(self) -> str:
        counts = sorted(len(kept) for kept in self.keep.values())
        spread = f"{counts[0]}" if self.uniform else f"{counts[0]} to {counts[-1]}"
        sure = (
            "" if self.sureness is None else f"; they stay in {100 * self.sureness:.0f} % of draws"
        )
        return (
            f"Plan({self.criterion}, per {self.per}: drops {self.n_dropped} of {self.n_sites} "
            f"experts, keeps {spread} of {self.n_experts} in each of {len(self.keep)} layers{sure})"
        )


def load_plan(path: str | PathLike[str]) -> Plan:
    """The plan in a file that :meth:`Plan.save` wrote."""
    file = Path(path)
    found = read_json(file)
    check_manifest(found, KIND, FORMAT, file)
    return plan_from_json(found, str(file))


def plan_from_json(found: Mapping[str, Any], where: str) -> Plan:
    """The plan in plain data; `where` names its origin in errors."""
    try:
        scores, settings = found["scores"], found["settings"]
        budget = settings.get("budget")
        return Plan(
            keep=with_number_keys(found["keep"]),
            protected=with_number_keys(found["protected"]),
            n_experts=int(found["n_experts"]),
            top_k=int(found["top_k"]),
            criterion=str(settings["criterion"]),
            drop=float(settings["drop"]),
            per=settings["per"],
            scores=None if scores is None else np.asarray(scores, dtype=np.float64),
            activations=found["inputs"].get("activations"),
            budget=None if budget is None else Budget.from_json(budget),
            groups=groups_from_json(found.get("router_groups")),
            sureness=found.get("sureness"),
            experts_per_layer=counts_from_json(found.get("experts_per_layer"), len(found["keep"])),
            drop_list=with_number_keys(found.get("drop_list", {})),
        )
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as cause:
        if isinstance(cause, PlanError | DataError | SettingsError):
            raise
        raise DataError(f"{where} is not a whole plan ({cause!r}); make it again") from cause


def grouped(groups: RouterGroups | None, least: int) -> tuple[int, int]:
    """Router groups, 1 if there are none, and how many experts of each stay for `least` in all."""
    if groups is None:
        return 1, least
    return groups.count, max(groups.least, -(-least // groups.count))


def _check_layer(layer: int, kept: tuple[int, ...], n_experts: int, top_k: int) -> None:
    if top_k < 1:
        raise PlanError(f"the plan has top_k={top_k}; a router selects at least one expert")
    if len(kept) < top_k:
        raise PlanError(
            f"layer {layer} would keep {len(kept)} experts but the router selects top_k={top_k}; "
            "lower drop"
        )
    if list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < n_experts:
        raise PlanError(
            f"layer {layer} keeps {kept}; expert ids must be ascending and in [0, {n_experts})"
        )
