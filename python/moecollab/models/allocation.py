"""Giving memory back to the system when tensors go."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_MMAP_THRESHOLD = -3  # glibc's malloc.h
_USUAL = 32 << 20  # where glibc ends up once large blocks come and go
_SMALL = 2 << 20


@contextmanager
def returned() -> Iterator[None]:
    """Lets tensors of 2 MB and more leave no holes while the block runs; nothing without glibc.

    glibc cuts blocks of up to 32 MB out of one heap, which small objects between them keep from
    shrinking: over the layers of a model it grew to several layers' size.
    """
    change = _mallopt()
    change(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        change(_MMAP_THRESHOLD, _USUAL)


def give_back() -> None:
    """Gives free memory back to the system; nothing without glibc.

    What is kept of every layer lies between blocks that a forward pass has freed, so that the heap
    grows by holes: 130 MB over the batches of a small model, and more in longer runs.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _mallopt() -> Callable[[int, int], object]:
    """Glibc's way to change its allocator, or something that does nothing."""
    try:
        found: Callable[[int, int], object] = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return lambda _name, _value: None
    return found
