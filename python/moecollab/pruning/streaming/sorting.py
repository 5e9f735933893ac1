"""Which tensors of a checkpoint are copied, cut, renamed or left out, by the model's own layout.

The model's skeleton says what each tensor in the module is, and the rules by which transformers
loads say which tensors on disk it is made of. What cannot be told for certain is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.headers import Stored
from moecollab.models.keep import Keep
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.pruning.streaming.naming import (
    check_complete,
    check_untied,
    routed_parts,
    targets_of,
)
from moecollab.pruning.streaming.numbering import Numbered, numbered
from moecollab.pruning.streaming.pieces import Piece, cut, whole

_LAYER = re.compile(r"^(.*?layers)\.(\d+)\.")
_ROUTES = re.compile(r"expert|router|(^|\.)gate\.")
_OLD = re.compile(r"(^|\.)(original_)?inv_freq$")


@dataclass(frozen=True)
class Sorted:
    """What becomes of a checkpoint.

    Parameters
    ----------
    pieces : list of Piece
        What is written.
    routers : tuple of str
        Tensors on disk that hold rows of routers.
    without_mtp : bool
        Whether layers that predict further tokens are left out, whose experts no plan knows.
    """

    pieces: list[Piece]
    routers: tuple[str, ...]
    without_mtp: bool


def sort_tensors(model: Any, checkpoint: Checkpoint, keep: Keep) -> Sorted:  # noqa: ANN401
    """Decides for every tensor of a checkpoint.

    Parameters
    ----------
    model : PreTrainedModel
        The skeleton, on the meta device.
    checkpoint : Checkpoint
        Its tensors.
    keep : Keep
        Experts that stay, which fit the model.

    Raises
    ------
    UnsupportedModelError
        When it is not certain what a tensor is, or how it can be cut.
    DataError
        When a router or an expert lacks a tensor.
    """
    return _Sorter(model, checkpoint, keep).run()


class _Sorter:
    """One model, its checkpoint and what stays of it."""

    def __init__(self, model: Any, checkpoint: Checkpoint, keep: Keep) -> None:  # noqa: ANN401
        self.model, self.checkpoint, self.keep = model, checkpoint, keep
        self.shapes: dict[str, Any] = model.state_dict()
        self.layers = find_moe_layers(model)
        self.parts = routed_parts(self.layers, self.shapes)
        self.targets = targets_of(model, checkpoint, self.shapes)
        check_untied(model, self.parts)
        check_complete(model, checkpoint, self.parts, self.targets)

    def run(self) -> Sorted:
        """Cuts layer by layer, then copies what is known and judges what is not."""
        rows, experts = self._by_layer()
        pieces = [self._rows(layer, key) for layer in self.layers for key in rows[layer.layer]]
        for layer in self.layers:
            pieces += self._experts(layer, experts[layer.layer])
        cut_up = {key for keys in (*rows.values(), *experts.values()) for key in keys}
        for key, stored in self.checkpoint.tensors.items():
            if key in self.targets and key not in cut_up:
                pieces.append(whole(key, stored))
        unknown = [key for key in self.checkpoint.tensors if key not in self.targets]
        further = [key for key in unknown if self._is_mtp(key)]
        without = self._cuts and any(_ROUTES.search(key) for key in further)
        self._check_unknown(set(unknown) - set(further))
        left = set(further) if without else set()
        pieces += [whole(key, self.checkpoint.tensors[key]) for key in unknown if key not in left]
        _check_names(pieces)
        return Sorted(pieces, tuple(key for keys in rows.values() for key in keys), without)

    @property
    def _cuts(self) -> bool:
        """Whether any expert goes."""
        return self.keep.cuts

    def _by_layer(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Keys of routers and of experts of each layer."""
        rows: dict[int, list[str]] = {layer.layer: [] for layer in self.layers}
        experts: dict[int, list[str]] = {layer.layer: [] for layer in self.layers}
        for key, target in self.targets.items():
            part = self.parts.get(target)
            if part is not None:
                (rows if part.router else experts)[part.layer.layer].append(key)
        return rows, experts

    def _kept(self, layer: MoeLayer, total: int) -> list[int]:
        """Kept experts, and what comes after the experts."""
        return [*self.keep.keep[layer.layer], *range(layer.n_experts, total)]

    def _rows(self, layer: MoeLayer, key: str) -> Piece:
        """Rows of a router for the experts that stay."""
        stored, shape = self.checkpoint.tensors[key], self._shape(key)
        if stored.shape != shape:
            raise _uncertain(key, stored, f"the rows of the router that it goes to are {shape}")
        dimension = 1 if len(shape) == 2 and shape[0] == 1 else 0
        total = shape[dimension]
        return cut(key, stored, dimension, total, self._kept(layer, total))

    def _experts(self, layer: MoeLayer, keys: Sequence[str]) -> list[Piece]:
        """What is kept of one layer's experts."""
        single = numbered(keys, layer.n_experts)
        self._check_every(layer, single)
        fused = [self._fused(layer, key) for key in keys if key not in single]
        return fused + self._renumbered(layer, single)

    def _fused(self, layer: MoeLayer, key: str) -> Piece:
        """Kept experts of a tensor that holds all of a layer."""
        stored, shape = self.checkpoint.tensors[key], self._shape(key)
        if layer.layout.flat:
            if stored.shape != shape or shape[0] % layer.n_experts:
                raise _uncertain(key, stored, f"the experts that it goes to are {shape}")
            return cut(key, stored, 0, layer.n_experts, self.keep.keep[layer.layer])
        total = stored.shape[0] if stored.shape else 0
        if total not in (layer.n_experts, shape[0]):
            raise _uncertain(key, stored, f"layer {layer.layer} has {layer.n_experts} experts")
        return cut(key, stored, 0, total, self._kept(layer, total))

    def _renumbered(self, layer: MoeLayer, single: Mapping[str, Numbered]) -> list[Piece]:
        """Tensors of kept experts under the numbers that those get."""
        most = max((place.number for place in single.values()), default=-1) + 1
        new = {old: number for number, old in enumerate(self._kept(layer, most))}
        return [
            whole(place.named(new[place.number]), self.checkpoint.tensors[key])
            for key, place in single.items()
            if place.number in new
        ]

    def _check_every(self, layer: MoeLayer, single: Mapping[str, Numbered]) -> None:
        """Refuses what some experts have and others lack, and experts beyond the last."""
        numbers: dict[tuple[str, str], set[int]] = {}
        for place in single.values():
            numbers.setdefault((place.before, place.after), set()).add(place.number)
        for key, place in single.items():
            found = numbers[place.before, place.after]
            fused = not isinstance(layer.experts, nn.ModuleList)
            most = self._shape(key)[0] if fused and not layer.layout.flat else layer.n_experts
            if found not in (set(range(layer.n_experts)), set(range(most))):
                why = f"{len(found)} experts have such a tensor, of {layer.n_experts}"
                raise _uncertain(key, self.checkpoint.tensors[key], why)

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.shapes[self.targets[key]].shape)

    def _is_mtp(self, key: str) -> bool:
        """Whether a tensor is of a layer that predicts further tokens than the next."""
        if any(part.startswith("mtp") for part in key.split(".")):
            return True
        found = _LAYER.match(key)
        return found is not None and int(found[2]) > self._last.get(found[1], int(found[2]))

    @cached_property
    def _last(self) -> dict[str, int]:
        """Number of the last layer that the model knows, by what comes before it in names."""
        found: dict[str, int] = {}
        for match in filter(None, map(_LAYER.match, self.targets)):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        return found

    def _check_unknown(self, keys: set[str]) -> None:
        """Refuses what the model has no place for, unless transformers says it needs none."""
        ignored = [re.compile(one) for one in self.model._keys_to_ignore_on_load_unexpected or ()]
        for key in sorted(keys):
            known = _OLD.search(key) or any(one.search(key) for one in ignored)
            if not known or _ROUTES.search(key):
                name = type(self.model).__name__
                raise _uncertain(key, self.checkpoint.tensors[key], f"{name} has no such tensor")


def _check_names(pieces: Sequence[Piece]) -> None:
    """Refuses two tensors under one name."""
    seen: set[str] = set()
    for piece in pieces:
        if piece.name in seen:
            raise DataError(
                f"two tensors would be called {piece.name}; the checkpoint is damaged: download or "
                "save it again"
            )
        seen.add(piece.name)


def _uncertain(key: str, stored: Stored, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"it is not certain what {key} of shape {stored.shape} in {stored.file.name} is: {why}; "
        "load the model and prune it in memory, or take an unquantised checkpoint"
    )
