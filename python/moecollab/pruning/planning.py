"""Plans: which experts stay under a budget, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError, MissingInputError, PlanError, SettingsError, ShapeError
from moecollab.manifest import check_manifest, manifest, read_json, refuse_existing, write_json

KIND, FORMAT = "plan", 1
Per: TypeAlias = Literal["layer", "model"]
Sites: TypeAlias = Mapping[int, Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which experts stay in each layer, and why.

    Parameters
    ----------
    keep : dict of int to tuple of int
        Kept expert ids of every MoE layer, ascending; at least `top_k` each.
    n_experts : int
        Routed experts per layer before anything goes.
    top_k : int
        Experts that the router selects per token.
    criterion : str
        What the experts were ranked by.
    drop : float
        Fraction of experts that was asked to go, in [0, 1).
    per : {"layer", "model"}
        Whether the budget holds in each layer or over all.
    protected : dict of int to tuple of int
        Experts that had to stay.
    scores : float64 array of shape (n_layers, n_experts), optional
        What the decision was made from; needed to equalise.
    activations : str, optional
        Digest of the activations behind the scores.
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

    def __post_init__(self) -> None:
        """Checks that the plan can be carried out."""
        _check_settings(self.drop, self.per)
        if not self.keep or list(self.keep) != sorted(self.keep):
            raise PlanError("the plan's layers are empty or out of order; make it with plan()")
        for layer, kept in self.keep.items():
            _check_layer(layer, kept, self.n_experts, self.top_k)
        for layer, held in self.protected.items():
            if not set(held) <= set(self.keep.get(layer, ())):
                raise PlanError(f"layer {layer} drops an expert it protects; make the plan again")
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
    def n_sites(self) -> int:
        """Number of routed experts before anything goes."""
        return len(self.keep) * self.n_experts

    @property
    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Ids of the experts that go, of every layer, ascending."""
        everyone = range(self.n_experts)
        return {
            layer: tuple(expert for expert in everyone if expert not in set(kept))
            for layer, kept in self.keep.items()
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
        """
        if self.uniform:
            return self
        if self.scores is None:
            raise MissingInputError(
                "the plan holds no scores, so its layers cannot be equalised; make it from scores"
            )
        held = max((len(ids) for ids in self.protected.values()), default=0)
        mean = (self.n_sites - self.n_dropped) / len(self.keep)
        kept = max(self.top_k, held, math.floor(mean + 0.5))
        guarded = _mask(self.protected, self.layers, self.n_experts)
        gone = _lowest_per_layer(self.scores, guarded, self.n_experts - kept)
        return Plan(
            keep=_kept_ids(gone, self.layers),
            n_experts=self.n_experts,
            top_k=self.top_k,
            criterion=self.criterion,
            drop=(self.n_experts - kept) / self.n_experts,
            per="layer",
            protected=self.protected,
            scores=self.scores,
            activations=self.activations,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data, as it stands in its file."""
        settings = {"drop": self.drop, "per": self.per, "criterion": self.criterion}
        inputs = {} if self.activations is None else {"activations": self.activations}
        return manifest(KIND, FORMAT, settings=settings, inputs=inputs) | {
            "keep": _with_text_keys(self.keep),
            "protected": _with_text_keys(self.protected),
            "n_experts": self.n_experts,
            "top_k": self.top_k,
            "scores": None if self.scores is None else self.scores.tolist(),
        }

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the plan as JSON."""
        write_json(Path(path), self.as_json(), overwrite=overwrite)

    def __repr__(self) -> str:
        counts = sorted(len(kept) for kept in self.keep.values())
        spread = f"{counts[0]}" if self.uniform else f"{counts[0]} to {counts[-1]}"
        return (
            f"Plan({self.criterion}, per {self.per}: drops {self.n_dropped} of {self.n_sites} "
            f"experts, keeps {spread} of {self.n_experts} in each of {len(self.keep)} layers)"
        )


_SAME = 1e-9
"""Fractions nearer than this are the same."""


def plan(
    scores: Scores | str | PathLike[str],
    *,
    drop: float,
    per: Per = "layer",
    keep: Sites | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Plan:
    """Experts to keep in each layer: the lowest scores go, the budget is met exactly.

    Parameters
    ----------
    scores : Scores or path
        One score per expert; higher means keep, and of equals the smaller id is kept.
    drop : float
        Fraction of experts to drop, in [0, 1); rounded to ``floor(drop * n + 0.5)`` experts.
    per : {"layer", "model"}
        Whether `n` counts the experts of each layer or of the model. With "model" every layer
        keeps at least `top_k`; what this spares goes elsewhere.
    keep : mapping of layer to expert ids, optional
        Experts that must stay, such as super experts.
    out : path, optional
        JSON file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    PlanError
        When the budget would leave a layer fewer experts than the router selects, or the scores
        hold for another `drop` only.
    """
    _check_settings(drop, per)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    found = scores if isinstance(scores, Scores) else load_scores(scores)
    made_for = found.settings.get("drop", drop)
    if isinstance(made_for, float) and abs(made_for - drop) > _SAME:
        raise PlanError(
            f"these {found.criterion} scores hold for drop={made_for:g}, not {drop:g}; "
            f"score again with drop={drop:g}"
        )
    protected = _checked_sites(keep or {}, found)
    guarded = _mask(protected, found.layers, found.n_experts)
    choose = _choose_per_layer if per == "layer" else _choose_per_model
    made = Plan(
        keep=_kept_ids(choose(found, guarded, drop), found.layers),
        n_experts=found.n_experts,
        top_k=found.top_k,
        criterion=found.criterion,
        drop=drop,
        per=per,
        protected=protected,
        scores=found.values,
        activations=found.activations,
    )
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


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
        return Plan(
            keep=_with_number_keys(found["keep"]),
            protected=_with_number_keys(found["protected"]),
            n_experts=int(found["n_experts"]),
            top_k=int(found["top_k"]),
            criterion=str(settings["criterion"]),
            drop=float(settings["drop"]),
            per=settings["per"],
            scores=None if scores is None else np.asarray(scores, dtype=np.float64),
            activations=found["inputs"].get("activations"),
        )
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as cause:
        if isinstance(cause, PlanError | DataError | SettingsError):
            raise
        raise DataError(f"{where} is not a whole plan ({cause!r}); make it again") from cause


def _choose_per_layer(scores: Scores, guarded: NDArray[np.bool_], drop: float) -> NDArray[np.bool_]:
    """Sites that go when the budget holds in each layer."""
    n_drop = _rounded(drop, scores.n_experts)
    room = _room(scores, guarded)
    if n_drop > room.min():
        row = int(room.argmin())
        layer, most = scores.layers[row], _fraction(int(room[row]), scores.n_experts)
        held = int(guarded[row].sum())
        reason = (
            f"the router selects top_k={scores.top_k}"
            if held <= scores.top_k
            else f"{held} are protected"
        )
        raise PlanError(
            f"layer {layer} would keep {scores.n_experts - n_drop} experts but {reason}; "
            f"lower drop to {most:g} or less"
        )
    return _lowest_per_layer(scores.values, guarded, n_drop)


def _choose_per_model(scores: Scores, guarded: NDArray[np.bool_], drop: float) -> NDArray[np.bool_]:
    """Sites that go when the budget holds over all layers, each keeping its floor."""
    n_drop = _rounded(drop, scores.n_sites)
    room = _room(scores, guarded)
    if n_drop > room.sum():
        raise _over_budget(scores, guarded, n_drop, int(room.sum()))
    place = _falling_order(scores.values, guarded).argsort(axis=1)
    may_go = (place < room[:, None]).ravel()
    order = np.lexsort((-np.arange(scores.n_sites), scores.values.ravel(), ~may_go))
    gone = np.zeros(scores.n_sites, dtype=np.bool_)
    gone[order[:n_drop]] = True
    return gone.reshape(scores.values.shape)


def _over_budget(scores: Scores, guarded: NDArray[np.bool_], n_drop: int, room: int) -> PlanError:
    """The error for a model-wide budget that the floors and protected experts do not allow."""
    advice = f"lower drop to {_fraction(room, scores.n_sites):g} or less"
    held = guarded.sum(axis=1)
    if (held >= scores.top_k).all():
        return PlanError(
            f"{n_drop} of {scores.n_sites} experts would go but {held.sum()} are protected, so "
            f"that only {room} can; {advice}"
        )
    order = np.lexsort((-np.arange(scores.n_sites), scores.values.ravel(), guarded.ravel()))
    kept = np.bincount(order[n_drop:] // scores.n_experts, minlength=scores.n_layers)
    row = int(np.where(held < scores.top_k, kept, scores.n_experts).argmin())
    return PlanError(
        f"layer {scores.layers[row]} would keep {kept[row]} experts but the router selects "
        f"top_k={scores.top_k}; {advice}"
    )


def _falling_order(values: NDArray[np.float64], guarded: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Experts of each layer from first to last to go; the guarded last, ties by larger id."""
    identity = np.broadcast_to(-np.arange(values.shape[1]), values.shape)
    return np.lexsort((identity, values, guarded), axis=1)


def _lowest_per_layer(
    values: NDArray[np.float64], guarded: NDArray[np.bool_], n_drop: int
) -> NDArray[np.bool_]:
    gone = np.zeros(values.shape, dtype=np.bool_)
    np.put_along_axis(gone, _falling_order(values, guarded)[:, :n_drop], True, axis=1)
    return gone


def _room(scores: Scores, guarded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many experts each layer can lose: int64 array of shape (n_layers,)."""
    held = np.maximum(guarded.sum(axis=1), scores.top_k)
    return np.asarray(scores.n_experts - held, dtype=np.int64)


def _rounded(drop: float, n: int) -> int:
    return math.floor(drop * n + 0.5)


def _fraction(n_drop: int, n: int) -> float:
    """A drop with four digits that surely takes no more than `n_drop` of `n`."""
    return max(0, math.floor(n_drop / n * 10_000)) / 10_000


def _kept_ids(gone: NDArray[np.bool_], layers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(np.flatnonzero(~row).tolist()) for layer, row in zip(layers, gone, strict=True)
    }


def _mask(protected: Sites, layers: tuple[int, ...], n_experts: int) -> NDArray[np.bool_]:
    """Which sites are protected: array of shape (n_layers, n_experts)."""
    mask = np.zeros((len(layers), n_experts), dtype=np.bool_)
    for layer, held in protected.items():
        mask[layers.index(layer), list(held)] = True
    return mask


def _check_settings(drop: float, per: str) -> None:
    if not 0 <= drop < 1:
        raise SettingsError("drop", drop, "in [0, 1)")
    if per not in get_args(Per):
        raise SettingsError("per", per, "'layer' or 'model'")


def _checked_sites(sites: Sites, scores: Scores) -> dict[int, tuple[int, ...]]:
    """The protected sites, sorted, each of them in the model."""
    found = {}
    for layer, experts in sorted(sites.items()):
        ids = tuple(sorted(set(experts)))
        if layer not in scores.layers:
            raise SettingsError("keep", layer, f"one of the MoE layers {scores.layers}")
        if ids and not 0 <= ids[0] <= ids[-1] < scores.n_experts:
            raise SettingsError("keep", ids, f"expert ids in [0, {scores.n_experts})")
        if ids:
            found[layer] = ids
    return found


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


def _with_text_keys(sites: Sites) -> dict[str, list[int]]:
    return {str(layer): list(experts) for layer, experts in sites.items()}


def _with_number_keys(sites: Mapping[str, Iterable[int]]) -> dict[int, tuple[int, ...]]:
    ids = {int(layer): tuple(int(expert) for expert in kept) for layer, kept in sites.items()}
    return dict(sorted(ids.items()))
