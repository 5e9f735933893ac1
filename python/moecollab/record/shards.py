"""Finished pieces of a recording on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moecollab.errors import DataError, StaleInputError
from moecollab.manifest import (
    MANIFEST,
    read_json,
    refuse_existing,
    write_json,
)
from moecollab.record.schema import TALLIES, TOKEN_COLUMNS, layer_columns
from moecollab.record.tallies import Tallies, load_tallies
from moecollab.record.tensors import write_tensors

Arrays: TypeAlias = dict[str, NDArray[Any]]
_SHOWN = 80


@dataclass(frozen=True)
class ShardStore:
    """The work folder of one recording: shards that are done and what they were made from.

    Parameters
    ----------
    target : Path
        Where the finished recording goes; the work folder lies beside it.
    manifest : dict
        Manifest of the recording.
    overwrite : bool
        Whether shards of another manifest are thrown away.
    """

    target: Path
    manifest: dict[str, Any]
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.target.parent / f".{self.target.name}.partial"

    def __enter__(self) -> ShardStore:
        """Takes the work folder, with the shards of a killed run with the same settings.

        Raises
        ------
        DataError
            When another process works there.
        StaleInputError
            When a run with another model, text or other settings was killed, saying what changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as cause:
            raise DataError(
                f"another process is recording into {self.target}; wait until it ends, or choose "
                "another folder"
            ) from cause
        try:
            if self.finished():  # by a run that was killed while it cleaned up
                self.close()
                return self
            refuse_existing(self.target, overwrite=self.overwrite)  # another may have been quicker
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.folder / "lock", timeout=0)

    def started(self) -> bool:
        """Whether there is a work folder, of a run that is under way or was killed."""
        return self.folder.exists()

    def finished(self) -> bool:
        """Whether the recording is in its place already, made from the same."""
        note = self.target / MANIFEST
        if self.overwrite or not note.is_file():
            return False
        found = {name: value for name, value in read_json(note).items() if name != "corpus"}
        return _comparable(found) == _comparable(self.manifest)

    def _prepare(self) -> None:
        """Keeps the shards of this manifest; those of another are refused or removed."""
        note = self.folder / MANIFEST
        try:
            before = read_json(note) if note.exists() else None
        except DataError:
            before = None
        for path in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            path.unlink()
        if before is not None and _comparable(before) == _comparable(self.manifest):
            return
        if before is not None and not self.overwrite:
            changed = _changes(_comparable(before), _comparable(self.manifest))
            raise StaleInputError(
                f"a recording into {self.target} was stopped half way, with another {changed}; "
                "repeat it as it was to go on, or pass overwrite=True (--overwrite) to start over"
            )
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != Path(self._lock.lock_file):
                path.unlink()
        write_json(note, self.manifest, overwrite=True)

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of a layer's table, with their types."""
        model, norms = self.manifest["model"], bool(self.manifest["settings"]["norms"])
        return layer_columns(model["top_k"], norms=norms, n_next=model.get("n_next", 0))

    def names(self, layer: int) -> dict[str, str]:
        """Names of a layer's arrays in a shard, by column."""
        return {name: f"{name}.{layer}" for name in self.columns if name not in TOKEN_COLUMNS}

    def read(self, number: int, layer: int) -> Arrays:
        """Columns of a layer in a shard.

        Raises
        ------
        DataError
            When the shard is missing or damaged, or lacks a column.
        """
        try:
            with safe_open(self._path(number), framework="numpy") as file:
                return {name: file.get_tensor(own) for name, own in self.names(layer).items()}
        except (SafetensorError, OSError) as cause:
            raise DataError(
                f"shard {number} of {self.folder} is missing, damaged or lacks an array; run "
                "extract again: it is made anew"
            ) from cause

    def has(self, number: int) -> bool:
        """Whether a shard is there, of full length and with all its arrays."""
        layers = self.manifest["model"]["layers"]
        wanted = {name for layer in layers for name in self.names(layer).values()}
        try:
            with safe_open(self._path(number), framework="numpy") as file:
                return wanted <= set(file.keys())
        except (SafetensorError, OSError):
            return False

    def write(self, number: int, arrays: Arrays) -> None:
        """Writes a shard whole or not at all."""
        write_tensors(self._path(number), arrays)

    def sums(self) -> tuple[Tallies | None, int]:
        """Sums of the first shards together, and of how many; None and 0 without any."""
        path = self.folder / TALLIES
        try:
            with safe_open(path, framework="numpy") as file:
                n_shards = int(json.loads((file.metadata() or {})["tallies"])["shards"])
            return load_tallies(path), n_shards
        except (SafetensorError, OSError, ValueError, KeyError):
            return None, 0

    def keep(self, sums: Tallies, n_shards: int) -> None:
        """Writes the sums of so many first shards in place of those of fewer."""
        sums.save(self.folder / TALLIES, shards=n_shards)

    def close(self) -> None:
        """Removes the work folder, and an older recording that a kill left behind."""
        for path in self.target.parent.glob(f".{escape(self.target.name)}.old.*"):
            if path.is_dir() and [entry.name for entry in path.iterdir()] == ["old"]:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


def _comparable(found: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what may differ between runs that do the same."""
    model = found.get("model")
    if not isinstance(model, dict):
        return found
    return found | {"model": {k: v for k, v in model.items() if k not in ("path", "n_next")}}


def _changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> str:
    """What differs between two manifests, for a message."""
    found = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_changes(old, new, f"{path}{name}."))
        elif old != new:
            shown = f" ({old!r}, now {new!r})"
            digest = path == "inputs." or len(shown) > _SHOWN
            found.append(f"{path}{name}{'' if digest else shown}")
    return ", ".join(filter(None, found))
