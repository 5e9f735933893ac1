"""What is done of a checkpoint that is being written, so that a killed run can go on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moecollab.errors import DataError, StaleInputError
from moecollab.manifest import digest_bytes, read_json, refuse_existing, replace_folder, write_json
from moecollab.pruning.streaming.copying import sampled
from moecollab.pruning.streaming.shards import Shard

_JOURNAL = "journal.json"


def begun(target: Path) -> bool:
    """Whether a run that writes a checkpoint is under way or was killed."""
    return _place_of(target).exists()


def _place_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@dataclass(frozen=True)
class Journal:
    """The work folder beside a checkpoint that is being written; a context manager.

    Parameters
    ----------
    target : Path
        Where the checkpoint goes.
    work : dict of str to str
        Digests of all that decides what is written.
    overwrite : bool
        Whether `target` may be replaced, and other work thrown away.
    """

    target: Path
    work: dict[str, str]
    overwrite: bool = False

    @property
    def _place(self) -> Path:
        return _place_of(self.target)

    @property
    def folder(self) -> Path:
        """Where files are written that are there to stay."""
        return self._place / "model"

    def __enter__(self) -> Journal:
        """Takes the work folder, with what a killed run of the same work left in it.

        Raises
        ------
        DataError
            When another process works there.
        StaleInputError
            When a run with another model, plan or shard size was killed.
        """
        self._place.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as cause:
            raise DataError(
                f"another process is writing {self.target}; wait until it ends, or choose another "
                "output"
            ) from cause
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.release()
        if self.folder.exists() and not any(self.folder.iterdir()):
            shutil.rmtree(self._place, ignore_errors=True)  # nothing was done

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self._place / "lock", timeout=0)

    def _prepare(self) -> None:
        self.scratch.unlink(missing_ok=True)  # it takes room and is written anew
        noted = self._read()
        before = noted.get("work")
        if before is not None and before != self.work and not self.overwrite:
            changed = [name for name, digest in self.work.items() if before.get(name) != digest]
            raise StaleInputError(
                f"writing {self.target} was stopped half way, with another {', '.join(changed)}; "
                "repeat it as it was to go on, or pass overwrite=True (--overwrite) to start over"
            )
        # A killed run that was to overwrite goes on when repeated; asked for anew, all goes.
        if before != self.work or (self.overwrite and not noted.get("overwrite")):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self._note({})
        if not self.finished():
            refuse_existing(self.target, overwrite=self.overwrite)
            self.folder.mkdir(exist_ok=True)

    def finished(self) -> bool:
        """Whether a run of this work was killed when all was in its place."""
        done = self._read().get("shards")
        return bool(done) and not self.folder.exists() and self.target.exists()

    @property
    def written(self) -> Path:
        """Where the files are that are done."""
        return self.target if self.finished() else self.folder

    @property
    def scratch(self) -> Path:
        """Where a file is written that is not whole yet."""
        return self._place / "unfinished"

    def has(self, shard: Shard) -> bool:
        """Whether a file is there as the journal says: its size, its header and samples of it."""
        found = self.folder / shard.name
        noted = self._read().get("shards", {}).get(shard.name)
        if noted is None or not found.is_file() or noted != _described(found):
            return False
        with found.open("rb") as file:
            return file.read(len(shard.header)) == shard.header

    def add(self, shard: Shard) -> None:
        """Puts the file in `scratch` in its place and notes it."""
        place = self.folder / shard.name
        self.scratch.replace(place)
        self._note(self._read().get("shards", {}) | {shard.name: _described(place)})

    def drop(self, shard: Shard) -> None:
        """Forgets a damaged file, which is written anew; one in its place needs `overwrite`."""
        if self.finished():
            self._note({})
            return
        (self.folder / shard.name).unlink(missing_ok=True)
        shards = self._read().get("shards", {})
        self._note({name: noted for name, noted in shards.items() if name != shard.name})

    def close(self) -> None:
        """Puts the checkpoint in its place, after which the work folder goes."""
        if self.folder.exists():
            replace_folder(self.folder, self.target)
        shutil.rmtree(self._place, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        path = self._place / _JOURNAL
        try:
            return read_json(path) if path.exists() else {}
        except DataError:  # damaged, so nothing in it counts
            return {}

    def _note(self, shards: dict[str, Any]) -> None:
        value = {"work": self.work, "overwrite": self.overwrite, "shards": shards}
        write_json(self._place / _JOURNAL, value, overwrite=True)


def _described(path: Path) -> dict[str, object]:
    size = path.stat().st_size
    return {"size": size, "digest": digest_bytes(sampled(path, size))}
