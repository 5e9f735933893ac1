"""Writing a file of tensors from others, in the kernel where it can, and comparing it with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from moecollab.errors import DataError
from moecollab.models.headers import damaged
from moecollab.pruning.streaming.shards import Shard

_AT_ONCE = 16 << 20  # bytes that one call of the kernel copies, between two looks at the progress
_AHEAD = 128 << 20  # bytes that the kernel is asked to read before they are copied
_FLUSHED = 256 << 20  # bytes after which the disk is given what was written
_BUFFER = 8 << 20  # bytes that are read at once where Python has to
_ELSEWHERE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
_SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
_PLACES = 64
_SAMPLE = 4096

Span: TypeAlias = tuple[Path, int, int]
"""A file, a first byte and a number of bytes."""

Done = Callable[[int], None]
"""Told of every number of bytes that is done."""


@dataclass
class Sources:
    """Files that are read, each opened once; a context manager that closes them."""

    _files: dict[Path, int] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def handle(self, path: Path) -> int:
        """Descriptor of a file."""
        if path not in self._files:
            file = self._open.enter_context(path.open("rb", buffering=0))
            self._files[path] = file.fileno()
        return self._files[path]


def write_shard(shard: Shard, target: Path, sources: Sources, done: Done) -> None:
    """Writes a file and waits until the disk has it.

    The kernel reads ahead what comes next, which by its name order is all over the old file, and
    writes back what is done while the rest is copied; cp has the one only in order and the other
    only when memory fills.

    Raises
    ------
    DataError
        When a file that is read has become shorter.
    OSError
        When the disk is full.
    """
    with target.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        _write(file.fileno(), shard.header)
        spans = list(_spans(shard))
        flush = _Flush(file.fileno(), pool)
        for span in _read_ahead(spans, sources):
            _copy(span, sources, file.fileno())
            flush.written(span[2])
            done(span[2])
        flush.finish()
        os.fsync(file.fileno())


class _Flush:
    """Gives the disk what was written of a file, beside the writing."""

    def __init__(self, target: int, pool: ThreadPoolExecutor) -> None:
        self._target, self._pool = target, pool
        self._waiting = 0
        self._under_way: Future[None] | None = None

    def written(self, count: int) -> None:
        """Takes note of more bytes, and begins once there are many."""
        self._waiting += count
        if self._waiting < _FLUSHED or not (self._under_way is None or self._under_way.done()):
            return
        self.finish()
        self._under_way, self._waiting = self._pool.submit(_SYNC, self._target), 0

    def finish(self) -> None:
        """Waits, and raises what went wrong."""
        if self._under_way is not None:
            self._under_way.result()


def _read_ahead(spans: Sequence[Span], sources: Sources) -> Iterator[Span]:
    """The spans, each after the kernel was asked to read some that follow."""
    asked = ahead = 0
    for path, start, count in spans:
        while asked < len(spans) and ahead < _AHEAD:
            file, first, size = spans[asked]
            _advise(sources.handle(file), first, size, "POSIX_FADV_WILLNEED")
            asked, ahead = asked + 1, ahead + size
        ahead -= count
        yield path, start, count


def _advise(file: int, first: int, size: int, advice: str) -> None:
    """Tells the kernel what is read, where it can be told; macOS cannot."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, first, size, getattr(os, advice))


def _spans(shard: Shard) -> Iterator[Span]:
    """All that is copied, in as few spans as can be, but none over what is copied at once."""
    for path, start, count in _ranges(shard):
        for begin in range(0, count, _AT_ONCE):
            yield path, start + begin, min(_AT_ONCE, count - begin)


def _ranges(shard: Shard) -> Iterator[Span]:
    """All that is copied, in as few spans as can be."""
    last: Span | None = None
    for piece in shard.pieces:
        for start, count in piece.runs:
            path, first = piece.stored.file, piece.stored.start + start
            if last is not None and last[0] == path and last[1] + last[2] == first:
                last = (path, last[1], last[2] + count)
                continue
            if last is not None:
                yield last
            last = (path, first, count)
    if last is not None:
        yield last


def _copy(span: Span, sources: Sources, target: int) -> None:
    """Appends a span of a file to another."""
    path, start, left = span
    while left:
        copied = _some(sources.handle(path), target, start, left)
        if not copied:
            raise damaged(path, "it ends within a tensor")
        start, left = start + copied, left - copied


def _some(source: int, target: int, start: int, count: int) -> int:
    """Copies up to a number of bytes; how many it were."""
    try:
        if hasattr(os, "copy_file_range"):  # macOS has none
            return os.copy_file_range(source, target, count, start)
    except OSError as cause:  # between two file systems, or of one that cannot
        if cause.errno not in _ELSEWHERE:
            raise
    data = os.pread(source, min(count, _BUFFER), start)
    _write(target, data)
    return len(data)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(target, view) :]


def compare(shard: Shard, target: Path, sources: Sources, done: Done) -> None:
    """Reads a written file again and compares it with what it was made of, byte for byte.

    Raises
    ------
    DataError
        When anything differs, naming the tensor.
    """
    with target.open("rb", buffering=0) as file:
        written = file.fileno()
        _advise(written, 0, 0, "POSIX_FADV_DONTNEED")  # from the disk, not from memory
        if os.pread(written, len(shard.header), 0) != shard.header:
            raise _differs(target, "its header")
        at = len(shard.header)
        for piece in shard.pieces:
            source = sources.handle(piece.stored.file)
            for start, count in piece.runs:
                if not _same(written, at, source, piece.stored.start + start, count):
                    raise _differs(target, piece.name)
                at += count
            done(piece.n_bytes)
        if os.pread(written, 1, at):
            raise _differs(target, "its length")


def _same(one: int, at: int, other: int, start: int, count: int) -> bool:
    """Whether two files hold the same in two places."""
    for begin in range(0, count, _BUFFER):
        size = min(_BUFFER, count - begin)
        read = os.pread(one, size, at + begin)
        if len(read) < size or read != os.pread(other, size, start + begin):
            return False
    return True


def _differs(target: Path, what: str) -> DataError:
    return DataError(
        f"{target.name} was not written as it was read: {what} differs; check the disk and run "
        "the same again"
    )


def sampled(path: Path, n_bytes: int) -> bytes:
    """What stands at evenly spaced places of a file, and at its ends."""
    with path.open("rb", buffering=0) as file:
        last = max(0, n_bytes - _SAMPLE)
        places = sorted({last * number // (_PLACES - 1) for number in range(_PLACES)})
        return b"".join(os.pread(file.fileno(), _SAMPLE, place) for place in places)
