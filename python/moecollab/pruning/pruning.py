"""Cutting experts out of a model: a smaller checkpoint that loads in stock engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from moecollab.errors import DataError, PlanError
from moecollab.manifest import new_folder, refuse_existing, write_bytes, write_json
from moecollab.models.keep import Keep, check_cut, check_keep, check_untied, read_keep
from moecollab.models.loading import ModelLike, load_model, quiet
from moecollab.models.masked import MASK_FILE, PRUNED, read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers, text_config
from moecollab.models.slicing import Change, slice_experts, slice_router, undo
from moecollab.models.uneven import Arrangement, Uneven, arranged, bar
from moecollab.pruning.card import Size, measured, write_card
from moecollab.pruning.plans import Plan, load_plan


def prune(
    model: ModelLike,
    plan: Plan | Keep | str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    uneven: Uneven | None = None,
    evaluations: Sequence[Any] | None = None,
    overwrite: bool = False,
) -> Any:  # noqa: ANN401 (transformers is untyped)
    """Cuts the experts that a plan drops, with their router rows, out of a model.

    Kept experts stay in their order and are numbered anew from 0. A loaded model is changed in
    place; its experts are gone for good, unlike under a mask.

    Parameters
    ----------
    model : Module, path or hub name
        The whole model.
    plan : Plan, Keep or path
        Kept experts of every MoE layer.
    out : path, optional
        Folder for the checkpoint; tokenizer and licence files go along, and a README.md says what
        was done.
    uneven : {"equalise", "pad", "native"}, optional
        How a plan whose layers keep different numbers is carried out: brought to one number by its
        scores; filled up with experts that no token can choose, where the router adds a bias to
        choose by; or as it is, a checkpoint that :func:`moecollab.load_model` alone loads.
    evaluations : sequence of Evaluation or paths, optional
        What the cut costs, for the README: of the whole model, and of this plan under a mask.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Module
        The smaller model.

    Raises
    ------
    PlanError
        When the plan does not fit the model, or its layers keep different numbers and `uneven`
        does not say how to write them.
    UnsupportedModelError
        When experts of the family cannot be cut, or its layers not be padded.
    """
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    costs = measured(evaluations)
    decided = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    if uneven == "equalise" and isinstance(decided, Plan):
        decided = decided.equalised()
    keep = read_keep(decided)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise PlanError(f"{model} is a masked model; prune the model that it masks instead")
    loaded, tokenizer = load_model(model)
    layers = find_moe_layers(loaded)
    check_keep(keep, layers)
    check_cut(layers)
    check_untied(loaded, layers)
    arrangement = arranged(keep, uneven, layers)
    before = Size.of_model(loaded)
    _cut(loaded, layers, arrangement)
    if out is not None:
        source = str(loaded.name_or_path) if isinstance(model, nn.Module) else str(model)
        with new_folder(Path(out), overwrite=overwrite) as folder, quiet():
            _save(loaded, folder, tokenizer, source)
            write_json(folder / MASK_FILE, {"kind": PRUNED} | arrangement.note())
            write_card(
                folder,
                base=source or type(loaded).__name__,
                plan=decided if isinstance(decided, Plan) else None,
                arrangement=arrangement,
                before=before,
                costs=costs,
            )
    return loaded


def _cut(model: nn.Module, layers: list[MoeLayer], arrangement: Arrangement) -> None:
    """Cuts all layers and the configuration, or nothing."""
    changes: list[Change] = []
    dummies = arrangement.dummies
    try:
        for layer in layers:
            held = arrangement.held.keep[layer.layer]
            changes += slice_router(layer, held)
            changes += slice_experts(layer, held)
            if layer.layer in dummies:
                changes.append(bar(layer, dummies[layer.layer]))
    except BaseException:
        undo(changes)
        raise
    owner, name = _count_field(model, layers[0])
    setattr(owner, name, arrangement.count)
    for entry, value in arrangement.config_entry().items():
        setattr(vars(model)["config"], entry, value)


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
