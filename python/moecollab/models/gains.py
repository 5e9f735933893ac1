"""Factors on the outputs of experts while a model runs, its router left as it is.

For analyses: what a model does without some experts' outputs, when no other expert takes their
place, or with more of them. Routing weights are multiplied where they are handed to the experts;
where there are none to multiply, the outputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from moecollab.errors import PlanError, SettingsError, ShapeError, UnsupportedModelError
from moecollab.models.applied import Applied
from moecollab.models.expert_modules import read_routing
from moecollab.models.keep import Keep, check_fits
from moecollab.models.remap import masks_first
from moecollab.models.routing import Call, MoeLayer, find_moe_layers

Factors: TypeAlias = Mapping[tuple[int, int], float] | ArrayLike
"""By (layer, expert), 1 where nothing is said; or of shape (n_layers, n_experts)."""

Blocking: TypeAlias = Literal["zero", "renormalise"]


class Gains(Applied):
    """Factors that are on a model's experts until they are removed.

    Parameters
    ----------
    model : Module
        The model.
    factors : mapping or array of shape (n_layers, n_experts)
        What each expert's outputs are multiplied with: 0 takes them away, 2 doubles them.
    renormalise : bool
        Whether the weights of each token are scaled to the sum they had before.

    Raises
    ------
    PlanError
        When the factors name layers or experts that the model does not have.
    UnsupportedModelError
        When weights are to be renormalised that the block itself makes of the router's logits.
    """

    def __init__(self, model: nn.Module, factors: Factors, *, renormalise: bool = False) -> None:
        self.layers = find_moe_layers(model)
        self.factors = _table(factors, self.layers)
        self.renormalise = renormalise
        self._rules: dict[int, _Rule] = {}
        super().__init__(model)

    @property
    def lost(self) -> dict[int, int]:
        """Tokens by layer, so far, none of whose experts had a part in the output.

        Their routed output is zero; shared experts and the residual stream are all they have.
        """
        return {layer: int(rule.lost) for layer, rule in self._rules.items()}

    def _apply(self) -> None:
        for layer, row in zip(self.layers, self.factors, strict=True):
            rule = _Rule(torch.from_numpy(row).float(), renormalise=self.renormalise)
            self._rules[layer.layer] = rule
            _ATTACH.get(layer.layout.capture, _attach_container)(self, layer, rule)

    def _add(self, module: nn.Module, hook: Any, *, before: bool) -> None:  # noqa: ANN401
        """A hook ahead of those who listen, and behind a mask, which knows other ids."""
        if before:
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            masks_first(module._forward_pre_hooks)
        else:
            handle = module.register_forward_hook(hook, prepend=True)
            masks_first(module._forward_hooks)
        self._handles.append(handle)

    def as_json(self) -> dict[str, Any]:
        """The factors that are not 1, by layer and expert."""
        found: dict[str, dict[str, float]] = {}
        for layer, row in zip(self.layers, self.factors, strict=True):
            for expert in np.flatnonzero(row != 1):
                found.setdefault(str(layer.layer), {})[str(expert)] = float(row[expert])
        return {"gains": found, "renormalise": self.renormalise}

    def __repr__(self) -> str:
        n_changed = int((self.factors != 1).sum())
        how = ", renormalised" if self.renormalise else ""
        return f"Gains({n_changed} of {self.factors.size} experts{how}, {self._where})"


class Blocked(Gains):
    """A plan under which dropped experts are chosen as ever, and have no part in the output.

    Parameters
    ----------
    model : Module
        The model.
    keep : Keep
        The experts whose outputs count.
    mode : {"zero", "renormalise"}
        What becomes of the weights of a token's other experts: they stay, or are scaled to the sum
        that all had.
    """

    def __init__(self, model: nn.Module, keep: Keep, mode: Blocking) -> None:
        layers = find_moe_layers(model)
        check_fits(keep, layers)
        self.keep, self.mode = keep, mode
        factors = np.zeros((len(layers), keep.n_experts))
        for row, kept in zip(factors, keep.keep.values(), strict=True):
            row[list(kept)] = 1
        super().__init__(model, factors, renormalise=mode == "renormalise")

    def as_json(self) -> dict[str, Any]:
        """The plan, and what becomes of the weights."""
        return self.keep.as_json() | {"mode": self.mode}


def _table(factors: Factors, layers: list[MoeLayer]) -> NDArray[np.float64]:
    """Factors as (n_layers, n_experts), checked."""
    shape = (len(layers), max(layer.n_experts for layer in layers))
    if isinstance(factors, Mapping):
        table = np.ones(shape)
        place = {layer.layer: number for number, layer in enumerate(layers)}
        counts = {layer.layer: layer.n_experts for layer in layers}
        for (layer, expert), factor in factors.items():
            if not 0 <= expert < counts.get(layer, 0):
                raise PlanError(
                    f"there is no expert {expert} in an MoE layer {layer}; the model has layers "
                    f"{list(place)} of {counts.get(layer, shape[1])} experts"
                )
            table[place[layer], expert] = factor
    else:
        table = np.array(factors, dtype=np.float64)
    if table.shape != shape:
        raise ShapeError(
            f"the factors have shape {table.shape}, expected {shape}; give one row per MoE layer"
        )
    if not np.isfinite(table).all():
        raise SettingsError("gain", float(table[~np.isfinite(table)][0]), "finite")
    return table


class _Rule:
    """What becomes of the routing weights of one layer.

    Parameters
    ----------
    factors : float32 Tensor of shape (n_experts,)
        By expert; ids past the experts (skipping, identity) have 1.
    renormalise : bool
        Whether each token's weights keep their sum.
    """

    def __init__(self, factors: Tensor, *, renormalise: bool) -> None:
        self.factors = torch.cat([factors, factors.new_ones(1)])
        self.renormalise = renormalise
        self.lost = torch.zeros((), dtype=torch.int64)

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """New weights, (…, top_k); all zero where no chosen expert has a part any more."""
        if self.factors.device != ids.device:
            self.factors, self.lost = self.factors.to(ids.device), self.lost.to(ids.device)
        wide = weights.float()
        found = wide * self.factors[ids.long().clamp(max=len(self.factors) - 1)]
        left = (found != 0).any(dim=-1)
        self.lost += ((wide != 0).any(dim=-1) & ~left).sum()
        if self.renormalise:
            ratio = wide.sum(dim=-1) / found.sum(dim=-1)
            found = found * torch.where(left, ratio, 0.0)[..., None]
        return found.to(weights.dtype)


def _attach_container(gains: Gains, layer: MoeLayer, rule: _Rule) -> None:
    """Containers are called with ids and weights."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        call = Call.read(args, kwargs)
        changed = call.with_values(None, None, rule(call.ids, call.weights))
        return changed.args, changed.kwargs

    gains._add(layer.experts, before, before=True)


def _attach_scaled_input(gains: Gains, layer: MoeLayer, rule: _Rule) -> None:
    """The weight multiplies the input of Llama 4's experts, so the outputs are multiplied."""
    factors: list[Tensor] = []

    def routed(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        scores = output[0]  # (n_positions, n_experts), 0 where not chosen
        experts = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        new = rule(experts, scores).float()
        factors[:] = [torch.where(scores == 0, 0.0, new / scores.float()).T.reshape(-1, 1)]

    def ran(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-1])
        return (rows * factors.pop().to(rows.dtype)).reshape(output.shape)

    gains._add(layer.router, routed, before=False)
    gains._add(layer.experts, ran, before=False)


def _attach_sorted(gains: Gains, layer: MoeLayer, rule: _Rule) -> None:
    """JetMoE's router sorts the rows of its experts and returns the weight of each."""

    def routed(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        order, token, gates, sizes, logits = output
        counts = torch.tensor(sizes, device=order.device)
        experts = torch.arange(len(counts), device=order.device).repeat_interleave(counts)
        back = order.argsort()
        shape = (-1, layer.top_k)
        new = rule(experts[back].reshape(shape), gates[back].reshape(shape))
        return order, token, new.reshape(-1)[order], sizes, logits

    gains._add(layer.router, routed, before=False)


def _attach_modules(gains: Gains, layer: MoeLayer, rule: _Rule) -> None:
    """Lists of experts get their weights from the router, or from the block itself."""
    given = layer.layout.routing is None
    if not given and gains.renormalise:
        raise UnsupportedModelError(
            f"the blocks of {layer.layout.family} make weights of logits themselves, so they "
            "cannot be renormalised; use mode='zero' or 'reroute'"
        )

    def routed(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        ids, weights = read_routing(layer, output)
        new = rule(ids, weights)
        return tuple(new if part is weights else part for part in output) if given else None

    def ran(number: int, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        return _multiplied(output, float(rule.factors[number]))

    gains._add(layer.router, routed, before=False)
    for number, expert in enumerate(layer.experts.children()):
        if not given:
            gains._add(expert, partial(ran, number), before=False)


def _multiplied(output: Any, factor: float) -> Any:  # noqa: ANN401
    """What an expert returned, its first tensor multiplied."""
    if isinstance(output, Tensor):
        return output * factor
    first, *rest = output
    return (first * factor, *rest)


_ATTACH: dict[str, Callable[[Gains, MoeLayer, _Rule], None]] = {
    "scaled_input": _attach_scaled_input,
    "sorted": _attach_sorted,
    "modules": _attach_modules,
}
