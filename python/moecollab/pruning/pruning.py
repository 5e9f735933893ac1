"""Cutting experts out of a model: a smaller checkpoint that loads in stock engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from moecollab.embedded import located
from moecollab.errors import DataError, PlanError, SettingsError
from moecollab.manifest import new_folder, refuse_existing, write_bytes, write_json
from moecollab.models.keep import Keep, check_cut, check_keep, check_untied, read_keep
from moecollab.models.loading import ModelLike, load_model, quiet
from moecollab.models.masked import (
    MASK_FILE,
    PRUNED,
    cut_in_memory,
    note_cut,
    original_of,
    read_masked,
)
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import all_or_nothing, slice_experts, slice_router
from moecollab.models.uneven import (
    Arrangement,
    Uneven,
    arranged,
    bar,
)
from moecollab.pruning.card import (
    CARD,
    DROPPED,
    About,
    Making,
    Size,
    about,
    base_name,
    card,
    of_the_base,
    origin_of,
)
from moecollab.pruning.counts import (
    count_field,
    count_names,
    further_counts,
    holder_of,
    set_count,
)
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.streaming.folder import Writing, prune_folder
from moecollab.pruning.streaming.journal import begun
from moecollab.pruning.streaming.shards import parse_size

SHARD = 5_000_000_000
"""Bytes of tensors in one file of a checkpoint that is written from memory, at most."""


def prune(
    model: ModelLike,
    plan: Plan | Keep | str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    uneven: Uneven | None = None,
    evaluations: Sequence[Any] | None = None,
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
    plan : Plan, Keep or path
        Kept experts of every MoE layer.
    out : path, optional
        Folder for the checkpoint; tokenizer and licence files go along, and a README.md says what
        was done.
    uneven : {"equalise", "pad", "native"}, optional
        How a plan whose layers keep different numbers is carried out: brought to one number by its
        scores; filled up with experts that no token can choose, where the router adds a bias to
        choose by (the model is then built in memory); or as it is, a checkpoint that
        :func:`moecollab.load_model` alone loads.
    evaluations : sequence of Evaluation or paths, optional
        What the cut costs, for the README: of the whole model, and of this plan under a mask.
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
        When the plan does not fit the model, or its layers keep different numbers and `uneven`
        does not say how to write them.
    UnsupportedModelError
        When experts of the family cannot be cut, its layers not be padded, or it is not certain
        what a tensor on disk is.
    """
    model, size = located(model), parse_size(shard_size)
    decided = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    if uneven == "equalise" and isinstance(decided, Plan):
        decided = decided.equalised()
    keep = read_keep(decided)
    in_memory = uneven == "pad" and not keep.uniform
    source = _folder(model) if out is not None and not in_memory else None
    if verify and source is None:
        raise SettingsError("verify", verify, "False, unless a folder is pruned into another")
    if out is not None and not (source is not None and begun(Path(out))):
        refuse_existing(Path(out), overwrite=overwrite)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise PlanError(f"{model} is a masked model; prune the model that it masks instead")
    made = decided if isinstance(decided, Plan) else None
    why = about(model, keep, made, evaluations)
    how = Writing(shard_size=size, verify=verify, overwrite=overwrite, uneven=uneven, about=why)
    if source is not None and out is not None:
        return prune_folder(source, keep, Path(out), how)
    return _prune_loaded(model, keep, out, how)


def _folder(model: ModelLike) -> Path | None:
    """The folder that a model is in, if it is given as one."""
    return None if isinstance(model, nn.Module) or not Path(model).is_dir() else Path(model)


def _prune_loaded(
    model: ModelLike, keep: Keep, out: str | PathLike[str] | None, how: Writing
) -> Any:  # noqa: ANN401
    """Cuts a model in memory, and writes it if there is an output."""
    loaded, tokenizer = load_model(model)
    layers = find_moe_layers(loaded)
    check_keep(keep, layers)
    check_cut(layers)
    check_untied(loaded, layers)
    arrangement = arranged(keep, how.uneven, layers)
    before, since = Size.of_model(loaded), cut_in_memory(loaded)
    _cut(loaded, layers, arrangement)
    if out is not None:
        note = {"kind": PRUNED} | arrangement.note(original_of(origin_of(model), keep, since))
        with written(loaded, tokenizer, model, Path(out), note, how) as folder:
            if how.about is not None:
                write_card(folder, how.about, arrangement, before)
    return loaded


@contextmanager
def written(
    loaded: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    source: ModelLike,
    out: Path,
    note: dict[str, Any],
    how: Writing,
) -> Iterator[Path]:
    """A folder with a changed model, its tokenizer and a note of what was done, to add to.

    It takes its place when the block ends. `source` is what was given as the model.
    """
    with new_folder(out, overwrite=how.overwrite) as folder, quiet():
        _save(loaded, folder, how.shard_size)
        _save_beside(tokenizer, Path(origin_of(source)), folder)
        write_json(folder / MASK_FILE, note)
        yield folder


def write_card(
    folder: Path, why: About, arrangement: Arrangement, before: Size, making: Making = DROPPED
) -> None:
    """Writes the card of a checkpoint that is there; `before` is the size of its base."""
    text = card(why, arrangement, (before, Size.of_folder(folder)), making)
    write_bytes(folder / CARD, text.encode())


def check_uniform(keep: Keep) -> None:
    """Raises PlanError unless every layer keeps the same number of experts."""
    counts = sorted({len(kept) for kept in keep.keep.values()})
    if len(counts) > 1:
        raise PlanError(
            f"the plan keeps {counts[0]} to {counts[-1]} experts in a layer, but here all layers "
            "must keep equally many; plan with per='layer', or pass plan.equalised()"
        )


def _cut(model: nn.Module, layers: list[MoeLayer], arrangement: Arrangement) -> None:
    """Cuts all layers and the configuration, or nothing."""
    dummies = arrangement.dummies
    with all_or_nothing() as changes:
        for layer in layers:
            held = arrangement.held.keep[layer.layer]
            changes += slice_router(layer, held)
            changes += slice_experts(layer, held)
            if layer.layer in dummies:
                changes.append(bar(layer, dummies[layer.layer]))
    set_count(model, layers[0], arrangement.count, arrangement.config_entry())
    note_cut(model, arrangement.held)


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


def _save_beside(tokenizer: Any, source: Path, folder: Path) -> None:  # noqa: ANN401
    """Writes a tokenizer, by its original files where there are any, and the base's own README."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in of_the_base(source):
        shutil.copyfile(file, folder / base_name(file.name))
    for file in _tokenizer_files(source):
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

    Layers that predict further tokens (MTP) are counted as none: no model that was built has any.
    """
    layer = find_moe_layers(model)[0]
    owner, name = count_field(model, layer)
    names = count_names(model, layer)
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    counts = [(*place, 0) for place in further_counts(config)]
    holder = holder_of(config, names)
    if holder is not None:
        counts += [(*holder, alias, getattr(owner, name)) for alias in names]
    for *place, last, count in counts:
        held = config
        for part in place:
            held = held[part]
        held[last] = count
    if counts:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_bytes(path, text.encode(), overwrite=True)
