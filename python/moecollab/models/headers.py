"""Headers of safetensors files: what a file holds and where, checked before anything is read.

A file is a length of 8 bytes, a header in JSON with the type, shape and place of each tensor, and
the tensors (https://huggingface.co/docs/safetensors). Headers come from outside, so all that the
reference library refuses is refused here too, with a sentence that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from moecollab.errors import DataError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Types by their names in headers, in the order by which the reference library sorts them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: -rank for rank, name in enumerate(DTYPES)}
_LONGEST = 100_000_000  # bytes of a header, as in the reference library
_HUGE = 1 << 63
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Stored:
    """One tensor on disk, as its file's header describes it.

    Parameters
    ----------
    file : Path
        Where it is.
    start : int
        Its first byte in the file.
    shape : tuple of int
        Its shape.
    dtype : dtype
        Type of its values.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return prod(self.shape) * int(self.dtype.itemsize)


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors of one file by name, and its metadata.

    Raises
    ------
    DataError
        When the header is cut off, too long or not JSON, names a tensor twice or a type that is
        not known, or its tensors overlap, leave holes or do not fill the file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8:
            raise damaged(file, f"it has {size} bytes")
        if length > _LONGEST:
            raise damaged(file, f"it claims a header of {length} bytes, over {_LONGEST}")
        if size < 8 + length:
            raise damaged(file, "it ends within its header")
        text = opened.read(length)
    if not text.startswith(b"{"):
        raise damaged(file, "its header is not JSON")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unrepeated)
        metadata = _strings(header.pop(_METADATA, {}))
        found = {key: _stored(file, 8 + length, entry) for key, entry in header.items()}
        "".join(found).encode()  # half characters have names that cannot be written again
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise damaged(file, f"its header says {cause}") from cause
    _check_places(file, found, 8 + length, size)
    return found, metadata


def damaged(file: Path, why: str) -> DataError:
    """The error for a file that cannot be what it says."""
    return DataError(f"{file} is truncated or damaged ({why}); download or save it again")


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return found


def _strings(found: dict[str, Any]) -> dict[str, str]:
    if any(not isinstance(value, str) for value in found.values()):
        raise ValueError("metadata that is not of strings")
    return found


def _stored(file: Path, first: int, entry: dict[str, Any]) -> Stored:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(one) is not int or not 0 <= one < _HUGE for one in (start, end, *shape)):
        raise ValueError(f"offsets {start} to {end} and shape {shape}, not whole numbers from 0 up")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the type {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    found = Stored(file, first + start, shape, DTYPES[entry["dtype"]])
    if end - start != found.n_bytes:
        raise ValueError(f"{end - start} bytes for {shape} of {entry['dtype']}")
    return found


def _check_places(file: Path, found: Mapping[str, Stored], first: int, size: int) -> None:
    """Refuses tensors that overlap, leave holes or do not end where the file does."""
    reached = first
    places = sorted((one.start, one.start + one.n_bytes, key) for key, one in found.items())
    for start, end, key in places:
        if start != reached:
            kind = "overlaps another tensor" if start < reached else "leaves a hole before it"
            raise damaged(file, f"its header says that {key} {kind}")
        reached = end
    if reached > size:
        raise damaged(file, f"it has {size} bytes, which is less than its header says")
    if reached < size:
        raise damaged(file, f"it has {size - reached} bytes after its last tensor")


def in_order(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    """Names of a file's tensors as the reference library orders them: widest types, then names."""
    ranked = [(_RANK[_NAMES[dtype]], name.encode(), name) for name, dtype in tensors]
    return [name for _, _, name in sorted(ranked)]


def write_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The length and header of a file with some tensors, byte for byte as the reference library.

    Tensors come in the order that :func:`in_order` gives; one follows the other without a gap.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    reached = 0
    for name, dtype, shape in tensors:
        end = reached + prod(shape) * int(dtype.itemsize)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text
