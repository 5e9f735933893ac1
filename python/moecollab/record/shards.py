"""Finished pieces of a recording on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moecollab.errors import DataError, StaleInputError
from moecollab.manifest import (
    MANIFEST,
    read_json,
    refuse_existing,
    replace_folder,
    write_bytes,
    write_json,
)
from moecollab.record.schema import (
    SAMPLE_COLUMNS,
    SAMPLES,
    TALLIES,
    TOKEN_COLUMNS,
    TOKENS,
    VOCABULARY,
    VOCABULARY_COLUMNS,
    layer_columns,
    layer_file,
    write_table,
)
from moecollab.record.tallies import Tallies
from moecollab.record.windows import Sample

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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

    def read(self, number: int, names: Sequence[str] | None = None) -> Arrays | None:
        """Arrays of a shard, all or some, or None when it is not done or not readable."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                wanted = file.keys() if names is None else names
                return {name: file.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError):
            return None

    def has(self, number: int) -> bool:
        """Whether a shard seems to be done."""
        return self._path(number).exists()

    def read_whole(self, number: int) -> Arrays:
        """Arrays of a shard that was written just now."""
        arrays = self.read(number)
        if arrays is None:
            raise DataError(
                f"shard {number} of {self.folder} vanished while it was in use; run extract again"
            )
        return arrays

    def write(self, number: int, arrays: Arrays) -> None:
        """Writes a shard whole or not at all."""
        write_bytes(self._path(number), save(arrays), overwrite=True)

    def close(self) -> None:
        """Removes the work folder."""
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


def merge_shards(
    store: ShardStore,
    n_shards: int,
    samples: Sequence[Sample],
    tallies: Tallies,
    vocabulary: dict[int, str],
) -> None:
    """Turns finished shards into the recording's folder and puts it in its place."""
    folder = store.folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model, norms = store.manifest["model"], bool(store.manifest["settings"]["norms"])
    tokens = _token_table(samples)
    write_table(tokens, folder / TOKENS)
    write_table(_sample_table(samples), folder / SAMPLES)
    words = {"token_id": list(vocabulary), "text": list(vocabulary.values())}
    write_table(pl.DataFrame(words, schema=VOCABULARY_COLUMNS), folder / VOCABULARY)
    columns = layer_columns(model["top_k"], norms=norms, n_next=model.get("n_next", 0))
    slots = [name for name in columns if name not in TOKEN_COLUMNS]
    places = {name: tokens[name] for name in ("token", "sample", "position")}
    for layer in model["layers"]:
        found = _layer_arrays(store, n_shards, layer, slots, len(tokens))
        write_table(pl.DataFrame(places | found, schema=columns), folder / layer_file(layer))
    tallies.save(folder / TALLIES)
    write_json(folder / MANIFEST, store.manifest | {"corpus": _corpus_facts(samples, tallies)})
    replace_folder(folder, store.target)
    store.close()


def _corpus_facts(samples: Sequence[Sample], tallies: Tallies) -> dict[str, Any]:
    n_tokens = sum(len(sample.ids) for sample in samples)
    return {"n_tokens": n_tokens, "n_samples": len(samples), "domains": list(tallies.domains)}


def _layer_arrays(
    store: ShardStore, n_shards: int, layer: int, names: Sequence[str], n_tokens: int
) -> Arrays:
    """One layer's columns over all shards, in order."""
    found: Arrays = {}
    start = 0
    for number in range(n_shards):
        arrays = store.read(number, [f"{name}.{layer}" for name in names])
        if arrays is None:
            raise DataError(
                f"shard {number} of {store.folder} vanished while it was in use; run extract again"
            )
        for name in names:
            part = arrays[f"{name}.{layer}"]
            if name not in found:
                found[name] = np.empty((n_tokens, *part.shape[1:]), part.dtype)
            found[name][start : start + len(part)] = part
        start += len(part)
    return found


def _token_table(samples: Sequence[Sample]) -> pl.DataFrame:
    """One row per token, in corpus order."""
    lengths = np.array([len(sample.ids) for sample in samples])
    places = [
        np.arange(len(sample.ids)) if sample.positions is None else sample.positions
        for sample in samples
    ]
    columns = {
        "token": np.arange(int(lengths.sum())),
        "sample": np.repeat(np.arange(len(samples)), lengths),
        "position": np.concatenate(places),
        "token_id": np.concatenate([sample.ids for sample in samples]),
    }
    return pl.DataFrame(columns, schema=TOKEN_COLUMNS)


def _sample_table(samples: Sequence[Sample]) -> pl.DataFrame:
    columns = {
        "sample": range(len(samples)),
        "domain": [sample.document.domain for sample in samples],
        "n_tokens": [len(sample.ids) for sample in samples],
        "text_start": [sample.document.text.strip()[:80] for sample in samples],
    }
    return pl.DataFrame(columns, schema=SAMPLE_COLUMNS)
