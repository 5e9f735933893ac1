"""Cutting rows and experts out of a model's modules, so that it can be undone exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecollab.errors import PlanError
from moecollab.models.layout import COUNTS
from moecollab.models.routing import MoeLayer


@dataclass(frozen=True)
class Change:
    """One replaced entry of a module: a parameter, buffer, submodule or plain attribute."""

    store: dict[str, Any]
    name: str
    before: Any

    def undo(self) -> None:
        """Puts the same object back."""
        self.store[self.name] = self.before


def undo(changes: Iterable[Change]) -> None:
    """Undoes changes, last first."""
    for change in reversed(list(changes)):
        change.undo()


@contextmanager
def all_or_nothing() -> Iterator[list[Change]]:
    """Collects changes, which are undone if the block ends with an error or is interrupted."""
    changes: list[Change] = []
    try:
        yield changes
    except BaseException:
        undo(changes)
        raise


def router_rows(layer: MoeLayer) -> list[tuple[nn.Module, str, Tensor]]:
    """Owner, name and value of each router tensor that has one entry per expert."""
    found = []
    for path in layer.layout.rows:
        parent, _, name = path.rpartition(".")
        try:
            owner = layer.block.get_submodule(parent)
        except AttributeError:
            continue
        value = getattr(owner, name, None)
        if isinstance(value, Tensor):
            found.append((owner, name, value))
    return found


def slice_router(layer: MoeLayer, kept: Sequence[int], *, block: bool = True) -> list[Change]:
    """Keeps only the rows of some experts in a router; entries past the experts stay.

    Counts that the block caches change along with `block`; a block that still hands tokens out to
    all its experts needs them as they are.
    """
    changes: list[Change] = []
    rows = router_rows(layer)
    if not rows or _entries(rows[0][2]) < layer.n_experts:
        raise PlanError(
            f"the router of layer {layer.layer} has fewer rows than the layer has experts: "
            "the model is masked already; remove that mask first"
        )
    extra = _entries(rows[0][2]) - layer.n_experts
    for owner, name, value in rows:
        changes.append(replace_tensor(owner, name, _picked(value, layer.n_experts, kept)))
    owners = [*layer.router.modules(), *(owner for owner, _, _ in rows)]
    if block:
        owners.append(layer.block)
    if layer.layout.live_count:
        changes.append(_with_count(layer, len(kept)))
    return changes + _recount(owners, layer.n_experts, len(kept), extra)


def _with_count(layer: MoeLayer, count: int) -> Change:
    """Gives a router a configuration of its own, so that layers may keep different numbers."""
    owner: dict[str, Any] = vars(layer.router)
    change = Change(owner, "config", owner["config"])
    owner["config"] = copy.copy(owner["config"])
    setattr(owner["config"], layer.layout.count, count)
    return change


def slice_experts(layer: MoeLayer, kept: Sequence[int]) -> list[Change]:
    """Keeps only some experts in a container."""
    experts = layer.experts
    if isinstance(experts, nn.ModuleList):
        before = dict(experts._modules)
        survivors = {str(new): experts[old] for new, old in enumerate(kept)}
        owner: dict[str, Any] = experts.__dict__
        changes = [Change(owner, "_modules", before)]
        owner["_modules"] = survivors
        return changes + _recount([experts], layer.n_experts, len(kept), 0)
    changes = []
    for path in layer.layout.tensors:
        parent, _, name = path.rpartition(".")
        module = experts.get_submodule(parent)
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            shape = (layer.n_experts, -1, *value.shape[1:]) if layer.layout.flat else value.shape
            cut = _picked(value.detach().reshape(shape), layer.n_experts, kept)
            if layer.layout.flat:
                cut = cut.reshape(-1, *value.shape[1:])
            changes.append(replace_tensor(module, name, cut))
    return changes + _recount([*experts.modules()], layer.n_experts, len(kept), 0)


def _entries(value: Tensor) -> int:
    """Entries of a router tensor: rows, or columns of a (1, n) tensor."""
    return value.shape[1] if value.dim() == 2 and value.shape[0] == 1 else value.shape[0]


def _picked(value: Tensor, n_experts: int, kept: Sequence[int]) -> Tensor:
    """Some experts' entries, then all entries past the experts; a copy."""
    total = _entries(value)
    index = torch.tensor([*kept, *range(n_experts, total)], device=value.device)
    return value.detach().index_select(0 if value.shape[0] == total else 1, index)


def replace_tensor(owner: nn.Module, name: str, value: Tensor) -> Change:
    """Puts another tensor in the place of a parameter or buffer."""
    is_parameter = name in owner._parameters
    store: dict[str, Any] = vars(owner)["_parameters" if is_parameter else "_buffers"]
    before: Tensor = store[name]
    store[name] = nn.Parameter(value, before.requires_grad) if is_parameter else value
    return Change(store, name, before)


def _recount(owners: Iterable[nn.Module], before: int, after: int, extra: int) -> list[Change]:
    """Sets cached counts of experts, with and without the entries past them."""
    changes = []
    known = {before: after, before + extra: after + extra}
    for owner in {id(owner): owner for owner in owners}.values():
        for name in COUNTS:
            value = owner.__dict__.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value in known:
                changes.append(Change(owner.__dict__, name, value))
                owner.__dict__[name] = known[value]
    return changes
