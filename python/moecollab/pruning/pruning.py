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

from moecollab.errors import DataError, PlanError, SettingsError
from moecollab.manifest import new_folder, refuse_existing, write_bytes, write_json
from moecollab.models.keep import Keep, check_cut, check_keep, read_keep
from moecollab.models.loading import ModelLike, load_model, quiet
from moecollab.models.masked import MASK_FILE, PRUNED, read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import Change, slice_experts, slice_router, undo
from moecollab.pruning.counts import count_field, count_names, holder_of
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.streaming.folder import Writing, prune_folder
from moecollab.pruning.streaming.journal import begun
from moecollab.pruning.streaming.shards import parse_size


def prune(
    model: ModelLike,
    plan: Plan | str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    equalise: bool = False,
    shard_size: str | int = "5GB",
    verify: bool = False,
    overwrite: bool = False,
) -> Any:  # noqa: ANN401 (transformers is untyped)
    """Cuts the experts that a plan drops, with their router rows, out of a model.

    Kept experts stay in their order and are numbered anew from 0. With `out`, a model in a folder
    is never built: its files are copied without the experts that go, in memory that does not grow
    with the model, and a killed run goes on when it is repeated. A loaded model is changed in
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
    shard_size : str or int
        Bytes of tensors in one file of the checkpoint at most, such as "5GB".
    verify : bool
        Whether to read the checkpoint again and compare it with the folder it was made from.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Module or Path
        `out` where `model` is a folder and `out` is given; the smaller model otherwise.

    Raises
    ------
    DataError
        When files of the model are missing or damaged, or the checkpoint cannot be written.
    PlanError
        When the plan does not fit the model, or its layers keep different numbers.
    UnsupportedModelError
        When experts of the family cannot be cut, or it is not certain what a tensor on disk is.
    """
    size = parse_size(shard_size)
    source = _folder(model) if out is not None else None
    if verify and source is None:
        raise SettingsError("verify", verify, "False, unless a folder is pruned into another")
    if out is not None and not (source is not None and begun(Path(out))):
        refuse_existing(Path(out), overwrite=overwrite)
    decided = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    keep = read_keep(decided.equalised() if equalise else decided)
    if not keep.uniform:
        raise _not_uniform(keep)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise PlanError(f"{model} is a masked model; prune the model that it masks instead")
    if source is not None and out is not None:
        how = Writing(shard_size=size, verify=verify, overwrite=overwrite)
        return prune_folder(source, keep, Path(out), how)
    return _prune_loaded(model, keep, out, size, overwrite=overwrite)


def _folder(model: ModelLike) -> Path | None:
    """The folder that a model is in, if it is given as one."""
    return None if isinstance(model, nn.Module) or not Path(model).is_dir() else Path(model)


def _prune_loaded(
    model: ModelLike, keep: Keep, out: str | PathLike[str] | None, size: int, *, overwrite: bool
) -> Any:  # noqa: ANN401
    """Cuts a model in memory, and writes it if there is an output."""
    loaded, tokenizer = load_model(model)
    layers = find_moe_layers(loaded)
    check_keep(keep, layers)
    check_cut(layers)
    _cut(loaded, layers, keep)
    if out is not None:
        source = str(loaded.name_or_path) if isinstance(model, nn.Module) else str(model)
        with new_folder(Path(out), overwrite=overwrite) as folder, quiet():
            _save(loaded, folder, size)
            _save_tokenizer(tokenizer, source, folder)
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
    owner, name = count_field(model, layers[0])
    setattr(owner, name, len(keep.keep[layers[0].layer]))


def _save(model: Any, folder: Path, size: int) -> None:  # noqa: ANN401
    """Writes weights and configuration."""
    try:
        model.save_pretrained(folder, max_shard_size=size)
    except SafetensorError as cause:  # how a full disk shows itself
        raise DataError(
            f"the weights could not be written to {folder.parent} ({cause}); free space there or "
            "choose another output"
        ) from cause
    _write_aliases(model, folder)


def _save_tokenizer(tokenizer: Any, source: str, folder: Path) -> None:  # noqa: ANN401
    """Writes a tokenizer, by its original files where there are any."""
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
    """Writes the number of experts under every name that some version of transformers reads."""
    layer = find_moe_layers(model)[0]
    owner, name = count_field(model, layer)
    names = count_names(model, layer)
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    place = holder_of(config, names)
    if place is not None:
        held = config
        for part in place:
            held = held[part]
        held.update(dict.fromkeys(names, getattr(owner, name)))
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_bytes(path, text.encode(), overwrite=True)
