"""Planning: which experts stay under a budget."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import SHARE, DataError, MissingInputError, PlanError, SettingsError
from moecollab.manifest import refuse_existing
from moecollab.models.groups import RouterGroups
from moecollab.pruning.allocation import Allocation
from moecollab.pruning.budgets import AMOUNTS, Budget, Per
from moecollab.pruning.plans import Plan, grouped
from moecollab.pruning.sites import Named, Sites, kept_ids, read_sites, site_mask
from moecollab.pruning.units import Units, make_units

if TYPE_CHECKING:
    from moecollab.models.footprint import Footprint
    from moecollab.models.loading import ModelLike

_SAME = 1e-9
"""Fractions nearer than this are the same."""


def plan(  # noqa: PLR0913 (a budget can be said in several ways)
    scores: Scores | str | PathLike[str],
    *,
    drop: float | None = None,
    experts: int | None = None,
    mass: float | None = None,
    memory_gb: float | None = None,
    per: Per = "layer",
    floor: int = 0,
    groups: int | None = None,
    keep: Named = None,
    drop_list: Named = None,
    model: ModelLike | Footprint | None = None,
    similarity: NDArray[np.float64] | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Plan:
    """Experts to keep in each layer: the lowest scores go, the budget is met exactly.

    The amount is said in one of four ways, `drop`, `experts`, `mass` or `memory_gb`, or by a
    `drop_list` alone. Where routers choose among groups of experts, every group of a layer keeps
    equally many: what goes is one expert of each group at a time, and amounts are rounded to that.

    Parameters
    ----------
    scores : Scores or path
        One score per expert; higher means keep, and of equals the smaller id is kept.
    drop : float, optional
        Fraction of experts to drop, in [0, 1); rounded to ``floor(drop * n + 0.5)`` experts, of the
        `n` of each layer with ``per="layer"``.
    experts : int, optional
        Experts to keep: in each layer with ``per="layer"``, else in the model.
    mass : float, optional
        Share of the scores to keep, in (0, 1]; of each layer's with ``per="layer"``, else of all.
        Kept is the smallest set of experts that holds it, so layers keep different numbers. ESFT
        (arXiv:2407.01906) chooses by 0.2 of ``esft_token`` or 0.1 of ``esft_gate``; the `keep` of
        such a plan protects these in another.
    memory_gb : float, optional
        Most gigabytes (10⁹ bytes) of tensors in the checkpoint that is left; needs `model`. Kept
        are as many experts as fit, without those of the `drop_list`: they go even where all fit.
    per : {"layer", "model", "entropy", "similarity"}
        How layers share the budget. "layer": every layer drops equally many, or the same share
        where layers differ; under `memory_gb` some drop more if the `drop_list` takes more of
        them. "model": the lowest scores of the model go. "entropy": layers keep experts in
        proportion to exp(H), H the entropy of the shares of their scores. "similarity": GRAPE's
        allocation (arXiv:2604.06542, :func:`moecollab.pruning.sequences.by_similarity`). With all
        but "layer", what one layer cannot give goes elsewhere.
    floor : int
        Experts that every layer keeps at least; never fewer than the router selects.
    groups : int, optional
        Router groups of each layer, if the scores do not know them; those of the recording if None.
    keep : mapping of layer to expert ids, or path, optional
        Experts that must stay, such as super experts. A path is of JSON: such a mapping, or a plan,
        of which it is what that keeps.
    drop_list : mapping of layer to expert ids, or path, optional
        Experts that must go; they count towards the budget. Of a plan it is what that drops.
    model : Module, path, hub name or Footprint, optional
        For `memory_gb`, the whole model; only headers of its files are read.
    similarity : float64 array of shape (n_layers, n_experts, n_experts), or path, optional
        For ``per="similarity"``, how alike the experts of each layer are; a path is of ``.npy``.
    out : path, optional
        JSON file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    SettingsError
        When the amount is said twice or not at all, or an expert is to stay and to go.
    PlanError
        When the budget would leave a layer fewer experts than the router selects or than are
        protected, the drop-list takes more than the budget, or the scores hold for another `drop`.
    """
    budget = Budget(
        drop=drop, experts=experts, mass=mass, memory_gb=memory_gb, per=per, floor=floor
    )
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    found = scores if isinstance(scores, Scores) else load_scores(scores)
    doomed = read_sites("drop_list", drop_list, found)
    if not budget.amount and not doomed:
        raise MissingInputError(
            f"how much goes is not said; give one of {', '.join(AMOUNTS)} (drop is {SHARE}), or "
            "drop_list"
        )
    if budget.drop is not None:
        check_made_for(found, budget.drop)
    protected = read_sites("keep", keep, found)
    known = _groups(found, groups)
    kept = decide(
        replace(found, groups=known),
        budget,
        protected=protected,
        doomed=doomed,
        footprint=_footprint(model) if memory_gb is not None else None,
        similarity=_matrices(similarity),
    )
    n_gone = found.n_sites - int(kept.sum())
    went = n_gone / found.n_sites if budget.drop is None else budget.drop
    check_made_for(found, went, 0.5 / found.n_experts)
    made = Plan(
        keep=kept_ids(kept, found.layers),
        n_experts=found.n_experts,
        top_k=found.top_k,
        criterion=found.criterion,
        drop=went,
        per=per,
        protected=protected,
        scores=found.values,
        activations=found.activations,
        budget=None if drop is not None and budget == Budget(drop=drop, per=per) else budget,
        groups=known,
        sureness=_sureness(found, budget, kept) if not protected and not doomed else None,
        experts_per_layer=found.experts_per_layer,
        drop_list=doomed,
    )
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


def decide(
    scores: Scores,
    budget: Budget,
    *,
    protected: Sites | None = None,
    doomed: Sites | None = None,
    footprint: Footprint | None = None,
    similarity: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Which experts stay under a budget: bool array of shape (n_layers, n_experts).

    The arguments are those of :func:`plan`, read and checked.

    Raises
    ------
    PlanError
        When the budget cannot be met.
    """
    allocation = Allocation(
        budget=budget,
        scores=scores,
        units=_units(scores, protected or {}, doomed or {}, scores.groups, budget.floor),
        footprint=footprint,
        similarity=similarity,
    )
    return scores.present & ~allocation.units.gone(allocation.n_gone())


def _sureness(scores: Scores, budget: Budget, kept: NDArray[np.bool_]) -> float | None:
    """How probable it is that those who stay stay, if the scores know it for this budget."""
    if scores.spread is None or scores.spread.budget != budget.as_json():
        return None
    return float(scores.spread.kept_probability[kept].mean())


def check_made_for(scores: Scores, drop: float, near: float = _SAME) -> None:
    """Raises PlanError if the scores hold for another `drop`, further away than `near`."""
    made_for = scores.settings.get("drop", drop)
    if isinstance(made_for, float) and abs(made_for - drop) > near:
        raise PlanError(
            f"these {scores.criterion} scores hold for drop={made_for:g}, not {drop:g}; "
            f"score again with drop={drop:g}"
        )


def _groups(scores: Scores, asked: int | None) -> RouterGroups | None:
    """The router groups: those that were asked for, or else those of the recording."""
    if asked is None or (scores.groups is not None and scores.groups.count == asked):
        return scores.groups
    if scores.groups is not None:
        raise SettingsError("groups", asked, f"{scores.groups.count}, as was recorded, or left out")
    for n in dict.fromkeys(scores.counts_of_experts):
        if asked < 1 or n % asked:
            raise SettingsError("groups", asked, f"a divisor of the {n} experts")
    count = int(asked)
    return None if count == 1 else RouterGroups(count, -(-scores.top_k // count))


def _units(
    scores: Scores, protected: Sites, doomed: Sites, groups: RouterGroups | None, floor: int
) -> Units:
    """What goes together, with the floor of every layer."""
    guarded, out = (
        site_mask(sites, scores.layers, scores.n_experts) for sites in (protected, doomed)
    )
    if (guarded & out).any():
        row, expert = np.argwhere(guarded & out)[0]
        where = f"layer {scores.layers[row]} expert {expert}"
        raise SettingsError("drop_list", where, "of experts that are not in keep")
    fewest = min(scores.counts_of_experts)
    if floor > fewest:
        raise SettingsError("floor", floor, f"at most the {fewest} experts of a layer")
    n_groups, least = grouped(groups, max(scores.top_k, floor))
    counts = scores.counts_of_experts
    return make_units(scores.values, guarded, out, counts=counts, n_groups=n_groups, least=least)


def _footprint(model: ModelLike | Footprint | None) -> Footprint | None:
    from moecollab.models.footprint import Footprint

    return model if model is None or isinstance(model, Footprint) else Footprint.of(model)


def _matrices(
    given: NDArray[np.float64] | str | PathLike[str] | None,
) -> NDArray[np.float64] | None:
    """Similarities, from a file if a path is given."""
    if not isinstance(given, str | PathLike):
        return given
    try:
        return np.asarray(np.load(given, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError) as cause:
        raise DataError(
            f"{given} is not a readable .npy file ({cause}); write it with numpy.save"
        ) from cause
