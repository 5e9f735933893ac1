"""A mask on a loaded model: routers that can only choose the kept experts.

The router's rows are cut to the kept experts, so the model's own routing arithmetic runs on what is
left, and the ids that it chooses are mapped back before the experts run. Logits equal those of the
pruned model; nothing is copied but the router rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.manifest import read_json
from moecollab.models.applied import Applied
from moecollab.models.keep import Keep, check_keep, keep_from_json
from moecollab.models.remap import remap
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import replace_tensor, router_rows, slice_router, undo

MASK_FILE = "moecollab.json"
CHOICE_BIAS = "e_score_correction_bias"
"""What routers add to their scores to choose by, and not to weigh."""

MASKED = "masked model"
PRUNED = "pruned model"

_CUT = "_moecollab_cut"
"""Where a loaded model says which experts of the model in its folder it still has."""


class Mask(Applied):
    """A mask that is on a model until :meth:`remove` is called or a ``with`` block ends.

    Parameters
    ----------
    model : Module
        The masked model; it runs, and is watched, as before.
    keep : Keep
        The experts its routers can choose.
    """

    def __init__(self, model: nn.Module, keep: Keep) -> None:
        self.keep = keep
        super().__init__(model)

    def _apply(self) -> None:
        layers = find_moe_layers(self.model)
        check_keep(self.keep, layers)
        for layer in layers:
            kept = self.keep.keep[layer.layer]
            self._changes += slice_router(layer, kept, block=layer.layout.container)
            self._handles.append(remap(layer, kept))

    def as_json(self) -> dict[str, Any]:
        """The plan."""
        return self.keep.as_json()

    def __repr__(self) -> str:
        counts = sorted({len(kept) for kept in self.keep.keep.values()})
        kept = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        most = "" if self.keep.experts_per_layer is None else "up to "
        return f"Mask({kept} of {most}{self.keep.n_experts} experts, {self._where})"


@contextmanager
def layer_masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Masks one layer, whose weights must be there, while the block runs."""
    changes = slice_router(layer, kept, block=layer.layout.container)
    handle = remap(layer, kept)
    try:
        yield
    finally:
        handle.remove()
        undo(changes)


@contextmanager
def layer_barred(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Bars all but some experts of one layer by the bias that its router adds to choose.

    For trials: unlike a mask, it leaves the router's groups as large as they were. Experts are
    chosen nevertheless where a token's groups hold too few others.

    Raises
    ------
    UnsupportedModelError
        When the router has no such bias.
    """
    found = [row for row in router_rows(layer) if row[1] == CHOICE_BIAS]
    if not found:
        raise UnsupportedModelError(
            f"the router of layer {layer.layer} chooses by groups of experts and has no "
            f"{CHOICE_BIAS}, so no expert can be hidden by itself"
        )
    owner, name, value = found[0]
    barred = torch.full_like(value.detach(), -torch.inf)
    barred[..., list(kept)] = value.detach()[..., list(kept)]
    change = replace_tensor(owner, name, barred)
    try:
        yield
    finally:
        change.undo()


def kept_of(path: str | PathLike[str]) -> Keep | None:
    """The experts that a masked or pruned model's folder keeps, by ids of its base; else None."""
    file = Path(path) / MASK_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    part = {MASKED: "plan", PRUNED: "experts"}.get(str(found.get("kind")))
    kept = found.get(part) if part else None
    return keep_from_json(kept, str(file)) if isinstance(kept, dict) else None


def cut_in_memory(model: object) -> Keep | None:
    """The experts that a loaded model has, by ids of its folder, if it was cut since."""
    return vars(model).get(_CUT) if isinstance(model, nn.Module) else None


def note_cut(model: nn.Module, held: Keep) -> None:
    """Remembers a cut in memory; `held` are the experts that are left, by the ids before it."""
    vars(model)[_CUT] = composed(cut_in_memory(model), held)


def composed(since: Keep | None, keep: Keep) -> Keep:
    """What two cuts, one after the other, leave by the ids before the first."""
    if since is None:
        return keep
    held = since.keep
    ids = {layer: tuple(held[layer][one] for one in kept) for layer, kept in keep.keep.items()}
    return replace(since, keep=ids, settings={})


def original_of(path: str | PathLike[str], keep: Keep, since: Keep | None = None) -> Keep | None:
    """What a plan for a folder keeps, by ids of the first model that the folder was cut from.

    None where the folder is of a whole model, or the plan of one that was changed unseen. `since`
    is what was cut in memory before, of the model in the folder.
    """
    if since is not None:
        if {layer: len(held) for layer, held in since.keep.items()} != keep.counts:
            return None
        whole = composed(since, keep)
        return original_of(path, whole) or whole
    file = Path(path) / MASK_FILE
    found = read_json(file) if file.is_file() else {}
    first = found.get("original") or (found.get("experts") if found.get("kind") == PRUNED else None)
    if not isinstance(first, dict):
        return None
    whole, padding = keep_from_json(first, str(file)), padding_of(path)
    ids = {}
    for layer, kept in keep.keep.items():
        filled = set(padding.get(layer, ()))
        real = [place for place in range(keep.counts[layer]) if place not in filled]
        known = dict(zip(real, whole.keep.get(layer, ()), strict=False))
        if len(real) != len(whole.keep.get(layer, ())) or not set(kept) <= set(known):
            return None
        ids[layer] = tuple(known[one] for one in kept)
    return replace(whole, keep=ids, settings={})


def padding_of(path: str | PathLike[str]) -> dict[int, tuple[int, ...]]:
    """Experts by layer that only fill up the layers of a pruned model's folder."""
    file = Path(path) / MASK_FILE
    found = read_json(file).get("padding") if file.is_file() else None
    try:
        return {int(layer): tuple(map(int, ids)) for layer, ids in (found or {}).items()}
    except (AttributeError, TypeError, ValueError) as cause:
        raise DataError(f"{file} has a padding that is not of ids by layer; prune again") from cause


def read_masked(path: str | PathLike[str]) -> tuple[str, Keep] | None:
    """Base model and kept experts of a masked model's folder; None for any other path."""
    file = Path(path) / MASK_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    if found.get("kind") != MASKED:
        return None
    base = str(found.get("base"))
    if not Path(base).is_dir() and Path(base).is_absolute():
        raise DataError(
            f"{file} masks {base}, which does not exist; put the model back or mask it again"
        )
    plan = found.get("plan")
    return base, keep_from_json(plan if isinstance(plan, dict) else {}, str(file))
