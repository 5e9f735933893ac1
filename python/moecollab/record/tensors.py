"""Safetensors written array by array, so that there is no copy of them all in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.manifest import open_whole

_CODES = {
    "uint8": "U8",
    "uint16": "U16",
    "int32": "I32",
    "int64": "I64",
    "float32": "F32",
    "float64": "F64",
}


def write_tensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file of arrays whole or not at all; an older one is replaced.

    Parameters
    ----------
    path : Path
        The file; its folder is there.
    arrays : mapping of str to array
        Of types that recordings hold. Those of the widest numbers come first, so that all start
        where their type needs it.
    metadata : mapping of str to str, optional
        What else the header says.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        value = arrays[name]
        start, end = end, end + value.nbytes
        described = {"dtype": _CODES[value.dtype.name], "shape": list(value.shape)}
        header[name] = described | {"data_offsets": [start, end]}
    note = json.dumps(header, separators=(",", ":")).encode()
    note += b" " * (-len(note) % 8)
    with open_whole(path) as file:
        file.write(len(note).to_bytes(8, "little") + note)
        for name in names:
            value = np.ascontiguousarray(arrays[name])
            file.write(value.astype(value.dtype.newbyteorder("<"), copy=False).reshape(-1).data)
