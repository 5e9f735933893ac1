"""A smaller checkpoint from a folder of safetensors, whose model is never built.

Headers and the model's skeleton say what becomes of each tensor; then bytes are copied from file to
file, so memory does not grow with the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecollab import progress
from moecollab.errors import DataError, StaleInputError
from moecollab.manifest import digest_file, digest_json, dump_json
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.keep import Keep, check_cut, check_keep
from moecollab.models.loading import check_tensor, explained, open_config, skeleton
from moecollab.models.masked import MASK_FILE, PRUNED, original_of, padding_of
from moecollab.models.routing import find_moe_layers
from moecollab.models.uneven import Uneven, arranged
from moecollab.pruning.card import CARD, About, Size, card
from moecollab.pruning.streaming.config import smaller_config
from moecollab.pruning.streaming.copying import Sources, compare, write_shard
from moecollab.pruning.streaming.files import CONFIG, kept_files, write_beside
from moecollab.pruning.streaming.journal import Journal
from moecollab.pruning.streaming.shards import Shard, index_of, lay_out
from moecollab.pruning.streaming.sorting import Sorted, sort_tensors

_MEGABYTE = 10**6


@dataclass(frozen=True)
class _Work:
    """All that is written, decided before anything is.

    Parameters
    ----------
    source : Path
        The folder that is read.
    beside : dict of str to str
        Text of the files that are written anew, by name.
    shards : list of Shard
        Files of weights.
    stamps : list
        Name, size and time of change of each file of weights that is read.
    digests : dict of str to str
        What decides the result.
    """

    source: Path
    beside: dict[str, str]
    shards: list[Shard]
    stamps: list[tuple[str, int, int]]
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a checkpoint is written.

    Parameters
    ----------
    shard_size : int
        Bytes of tensors in one file at most.
    verify : bool
        Whether to read all that was written again and compare it with what it was made of.
    overwrite : bool
        Whether the output may be replaced.
    uneven : {"equalise", "native"}, optional
        How layers of different numbers are written.
    about : About, optional
        What a card tells of the model and the plan; without it none is written.
    """

    shard_size: int
    verify: bool = False
    overwrite: bool = False
    uneven: Uneven | None = None
    about: About | None = None


def prune_folder(source: Path, keep: Keep, out: Path, how: Writing) -> Path:
    """Writes the checkpoint in a folder without some experts, byte by byte from the old files.

    A run that was killed goes on where it stopped when it is run again as it was.

    Parameters
    ----------
    source : Path
        Folder with ``config.json`` and safetensors.
    keep : Keep
        Experts that stay.
    out : Path
        Folder for the smaller checkpoint.
    how : Writing
        Size of files, and what may happen to `out`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        When files are missing or damaged, a router's row is not finite, or the disk is full.
    PlanError
        When the plan does not fit the model.
    UnsupportedModelError
        When it is not certain how a tensor is to be cut.
    StaleInputError
        When `out` was begun from another model or plan, or the model changes while it is read.
    """
    _check_apart(source, out)
    work = _plan_work(source, keep, how)
    with _writing(out), Journal(out, work.digests, how.overwrite) as journal:
        if not journal.finished():
            _check_room(work, journal)
            _write(work, journal)
        if how.verify:
            _verify(work, journal)
        journal.close()
    return out


def _check_apart(source: Path, out: Path) -> None:
    """Refuses an output that is, holds or lies in the model that is read."""
    old, new = source.resolve(), out.resolve()
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise DataError(
            f"the output {out} and the model {source} are one folder or lie in each other; choose "
            "an output beside the model"
        )


def _plan_work(source: Path, keep: Keep, how: Writing) -> _Work:
    """Decides what is written, from headers and configuration alone."""
    model = skeleton(open_config(str(source), moe=True))
    layers = find_moe_layers(model)
    check_keep(keep, layers, padding_of(source))
    check_cut(layers)
    arrangement = arranged(keep, how.uneven, layers)
    with explained(str(source)):
        checkpoint = Checkpoint.open(str(source))
    stamps = _stamps(checkpoint)
    found = sort_tensors(model, checkpoint, keep)
    _check_routers(checkpoint, found)
    config = source.joinpath(CONFIG).read_text("utf-8")
    if keep.cuts:
        config = smaller_config(source / CONFIG, model, arrangement, without_mtp=found.without_mtp)
    if found.without_mtp:
        progress.say("layers that predict further tokens (MTP) are left out: no plan knows them")
    shards = lay_out(found.pieces, how.shard_size, checkpoint.metadata)
    noted = arrangement.note(original_of(source, keep))
    note = dump_json({"kind": PRUNED} | noted).decode()
    beside = {CONFIG: config, MASK_FILE: note}
    if how.about is not None:
        after = [(piece.shape, piece.n_bytes) for shard in shards for piece in shard.pieces]
        before = [(one.shape, one.n_bytes) for one in checkpoint.tensors.values()]
        beside[CARD] = card(how.about, arrangement, (Size.of(before), Size.of(after)))
    digests = {
        "model": digest_json([stamps, [digest_file(source / name) for name in kept_files(source)]]),
        "plan": digest_json([keep.as_json(), config]),
        "shard size": digest_json([[shard.name, shard.n_bytes] for shard in shards]),
    }
    return _Work(source, beside, shards, stamps, digests)


def _stamps(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of weights."""
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    found = [(file, file.stat()) for file in files]
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def _check_routers(checkpoint: Checkpoint, found: Sorted) -> None:
    """Refuses rows of routers that are not finite; experts are too many to be read for that."""
    for key in found.routers:
        with checkpoint.unread([key]) as tensors:
            check_tensor(key, tensors[key][:])


def _check_room(work: _Work, journal: Journal) -> None:
    """Refuses to begin what the disk has no room for."""
    needed = sum(shard.n_bytes for shard in work.shards if not journal.has(shard))
    free = shutil.disk_usage(journal.folder).free
    if needed > free:
        raise DataError(
            f"the checkpoint needs {needed / 1e9:.2f} GB more in {journal.target.parent}, which "
            f"has {free / 1e9:.2f} GB left; free space there or choose another output"
        )


def _write(work: _Work, journal: Journal) -> None:
    """Writes what is not there yet."""
    index = index_of(work.shards) if len(work.shards) > 1 else None
    write_beside(work.source, journal.folder, texts=work.beside, index=index)
    with Sources() as sources, _bar("pruning (MB)", work.shards) as done:
        for shard in work.shards:
            if journal.has(shard):
                done(sum(piece.n_bytes for piece in shard.pieces))
                continue
            write_shard(shard, journal.scratch, sources, done)
            journal.add(shard)
    _check_unchanged(work)


def _verify(work: _Work, journal: Journal) -> None:
    """Compares all that was written with the model; files that differ are no longer done."""
    folder, wrong = journal.written, []
    with Sources() as sources, _bar("verifying (MB)", work.shards) as done:
        for shard in work.shards:
            try:
                compare(shard, folder / shard.name, sources, done)
            except DataError as cause:
                journal.drop(shard)
                wrong.append(cause)
    if wrong:
        raise wrong[0]


@contextmanager
def _bar(what: str, shards: Sequence[Shard]) -> Iterator[Any]:
    """A function that is told of bytes and shows them."""
    total = sum(piece.n_bytes for shard in shards for piece in shard.pieces)
    with progress.track(what, total / _MEGABYTE) as bar:
        yield lambda count: bar.advance(count / _MEGABYTE)


def _check_unchanged(work: _Work) -> None:
    for name, size, changed in work.stamps:
        now = Path(name).stat()
        if (now.st_size, now.st_mtime_ns) != (size, changed):
            raise StaleInputError(
                f"{name} changed while it was read; run the same again with overwrite=True "
                "(--overwrite)"
            )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns a full disk and a folder that cannot be written into one sentence."""
    try:
        yield
    except OSError as cause:
        raise DataError(
            f"{out} could not be written ({cause.strerror or cause}); what is done is kept: free "
            "space there or make it writable and run the same again, or choose another output"
        ) from cause
