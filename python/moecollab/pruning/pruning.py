"""Cutting experts out of a model: a smaller checkpoint that loads in stock engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from moecollab.errors import DataError, PlanError
from moecollab.manifest import new_folder, refuse_existing, write_bytes, write_json
from moecollab.models.keep import Keep, check_cut, check_keep, read_keep
from moecollab.models.loading import ModelLike, load_model, quiet
from moecollab.models.masked import MASK_FILE, PRUNED, read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers, text_config
from moecollab.models.slicing import Change, slice_experts, slice_router, undo
from moecollab.pruning.plans import Plan, load_plan


def prune(
    model: ModelLike,
    plan: Plan | str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    equalise: bool = False,
    overwrite: bool = False,
) -> Any:  # noqa: ANN401 (transformers is untyped)
    """Cuts the experts that a plan drops, with their router rows, out of a model.

    Kept experts stay in their order and are numbered anew from 0. A loaded model is changed in
    place; its experts are gone for good, unlike under a mask.

    Parameters
    ----------
    model : Module, path or hub name
        The whole model.
    plan : Plan or path
        Kept experts of every MoE layer.
    out : path, optional
        Folder for the checkpoint; tokenizer files go along.
    equalise : bool
        Whether to bring a plan whose layers keep different numbers to one number.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Module
        The smaller model.

    Raises
    ------
    PlanError
        When the plan does not fit the model, or its layers keep different numbers.
    """
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    decided = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    keep = read_keep(decided.equalised() if equalise else decided)
    if not keep.uniform:
        raise _not_uniform(keep)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise PlanError(f"{model} is a masked model; prune the model that it masks instead")
    loaded, tokenizer = load_model(model)
    layers = find_moe_layers(loaded)
    check_keep(keep, layers)
    check_cut(layers)
    _cut(loaded, layers, keep)
    if out is not None:
        source = str(loaded.name_or_path) if isinstance(model, nn.Module) else str(model)
        with new_folder(Path(out), overwrite=overwrite) as folder, quiet():
            _save(loaded, folder, tokenizer, source)
            write_json(folder / MASK_FILE, {"kind": PRUNED, "experts": keep.as_json()})
    return loaded


def _not_uniform(keep: Keep) -> PlanError:
    counts = {layer: len(kept) for layer, kept in keep.keep.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return PlanError(
        f"layer {least} keeps {counts[least]} experts and layer {most} keeps {counts[most]}, but "
        "a checkpoint has one number for all layers; pass equalise=True (--equalise), plan with "
        "per='layer' and an amount other than mass, or mask the model instead"
    )


def _cut(model: nn.Module, layers: list[MoeLayer], keep: Keep) -> None:
    """Cuts all layers and the configuration, or nothing."""
    changes: list[Change] = []
    try:
        for layer in layers:
            kept = keep.keep[layer.layer]
            changes += slice_router(layer, kept)
            changes += slice_experts(layer, kept)
    except BaseException:
        undo(changes)
        raise
    owner, name = _count_field(model, layers[0])
    setattr(owner, name, len(keep.keep[layers[0].layer]))


def _count_field(model: nn.Module, layer: MoeLayer) -> tuple[Any, str]:
    """Configuration object and field with the number of experts."""
    owner: Any = text_config(model)
    *path, name = layer.layout.count.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _save(model: Any, folder: Path, tokenizer: Any, source: str) -> None:  # noqa: ANN401
    """Writes weights, configuration and tokenizer."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as cause:  # how a full disk shows itself
        raise DataError(
            f"the weights could not be written to {folder.parent} ({cause}); free space there or "
            "choose another output"
        ) from cause
    _write_aliases(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in _tokenizer_files(Path(source)):
        # The original files win: a tokenizer that is loaded and saved again may change its format.
        shutil.copyfile(file, folder / file.name)


def _tokenizer_files(source: Path) -> Iterator[Path]:
    """Files of a model's folder that belong to its tokenizer."""
    stems = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
    if not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name.startswith(stems) or file.suffix == ".model"):
            yield file


def _write_aliases(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Writes the number of experts under every name that some version of transformers reads.

    The name in ``config.json`` has changed between versions, and an older one that misses its name
    silently takes its default.
    """
    owner, name = _count_field(model, find_moe_layers(model)[0])
    aliases = getattr(type(owner), "attribute_map", {})
    target = aliases.get(name, name)
    names = {name, target, *(alias for alias, to in aliases.items() if to == target)}
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    place = _holder(config, target)
    if place is not None:
        place.update(dict.fromkeys(sorted(names), getattr(owner, name)))
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_bytes(path, text.encode(), overwrite=True)


def _holder(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The object, at the top or below, that has a key."""
    if name in config:
        return config
    parts = (_holder(value, name) for value in config.values() if isinstance(value, dict))
    return next((part for part in parts if part is not None), None)
