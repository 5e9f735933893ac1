"""Codes in a safetensors file: written piece by piece, read only where they are looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SchemaError
from moecollab.manifest import open_whole
from moecollab.patterns.codes import Codes

DTYPES = {"indptr": ("I64", np.int64), "atom": ("U32", np.uint32), "value": ("F32", np.float32)}
LONGEST_HEADER = 65_536


def write_codes(path: Path, parts: Callable[[], Iterable[Codes]]) -> None:
    """Writes codes that follow each other as one file, whole or not at all; holds one part.

    What reads an older file of that name goes on reading the old one.

    Parameters
    ----------
    path : path
        File to write.
    parts : callable
        Gives the parts anew at each call; they are gone through once per array.
    """
    n_rows = n_entries = 0
    for part in parts():
        n_rows, n_entries = n_rows + part.n_rows, n_entries + len(part.atom)
    shapes = {"indptr": n_rows + 1, "atom": n_entries, "value": n_entries}
    with open_whole(path) as file:
        file.write(_header(shapes))
        _write_pointers(file, parts())
        for part in parts():
            file.write(np.ascontiguousarray(part.atom).data)
        for part in parts():
            file.write(np.ascontiguousarray(part.value).data)


def read_codes(path: Path, n_atoms: int) -> Codes:
    """Codes whose arrays stay in the file until they are used.

    Raises
    ------
    DataError
        When the file is missing, truncated or damaged.
    SchemaError
        When arrays are missing, of other types, or do not fit together.
    """
    try:
        start, header = _read_header(path)
        arrays = {name: _array(path, start, header[name], name) for name in DTYPES}
    except KeyError as cause:
        raise SchemaError(f"{path} lacks {cause.args[0]}; fit again") from cause
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        raise DataError(f"{path} is missing, truncated or damaged; fit again") from cause
    codes = Codes(arrays["indptr"], arrays["atom"], arrays["value"])
    _check(codes, n_atoms, path)
    return codes


def _header(shapes: dict[str, int]) -> bytes:
    found, offset = {}, 0
    for name, (dtype, kind) in DTYPES.items():
        end = offset + shapes[name] * np.dtype(kind).itemsize
        found[name] = {"dtype": dtype, "shape": [shapes[name]], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_pointers(file: BinaryIO, parts: Iterable[Codes]) -> None:
    file.write(np.zeros(1, np.int64).data)
    offset = 0
    for part in parts:
        file.write((part.indptr[1:] + offset).astype(np.int64).data)
        offset += int(part.indptr[-1])


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= LONGEST_HEADER:
            raise ValueError(length)
        return 8 + length, dict(json.loads(file.read(length)))


def _array(path: Path, start: int, about: dict[str, Any], name: str) -> NDArray[Any]:
    """An array that is read where it is looked at."""
    dtype, kind = DTYPES[name]
    begin, end = (int(at) for at in about["data_offsets"])
    (length,) = (int(n) for n in about["shape"])
    if about["dtype"] != dtype:
        raise SchemaError(f"{path} holds {name} as {about['dtype']}, expected {dtype}; fit again")
    fits = 0 <= begin <= end and end - begin == length * np.dtype(kind).itemsize
    if not fits or start + end > path.stat().st_size:
        raise ValueError(name)
    if length == 0:
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r", start + begin, (length,))


def _check(codes: Codes, n_atoms: int, where: Path, block: int = 1 << 20) -> None:
    """Goes through the arrays once, a block at a time."""
    pointers, n_entries = codes.indptr, len(codes.atom)
    good = len(pointers) > 0 and pointers[0] == 0 and pointers[-1] == n_entries
    good = good and len(codes.value) == n_entries
    for at in range(0, len(pointers) if good else 0, block):
        good = good and bool((np.diff(pointers[at : at + block + 1]) >= 0).all())
    for at in range(0, n_entries if good else 0, block):
        good = good and int(codes.atom[at : at + block].max()) < n_atoms
        if good and not math.isfinite(float(codes.value[at : at + block].sum(dtype=np.float64))):
            raise DataError(f"{where} holds values that are not finite; fit again")
    if not good:
        raise SchemaError(f"{where} holds codes that do not fit together; fit again")
