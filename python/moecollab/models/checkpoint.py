"""The safetensors of a model on disk: what they hold, and reading a few tensors of them.

The format is a length of 8 bytes, a header in JSON with the type, shape and place of each tensor,
and the tensors (https://huggingface.co/docs/safetensors). Files are read and not mapped, into one
block for all tensors that are wanted: a mapped file counts with all its bytes against a limit, and
thousands of small tensors leave holes when they go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from moecollab.errors import DataError
from moecollab.manifest import read_json

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ALIGNED = 64  # bytes; what any type of number may start at
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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


class Unread:
    """A tensor that is read when it is indexed, as the loader of transformers does.

    Parameters
    ----------
    stored : Stored
        Where it is.
    block : uint8 Tensor of shape (n_bytes,)
        Memory for it.
    """

    def __init__(self, stored: Stored, block: Tensor) -> None:
        self._stored = stored
        self._block = block

    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        return list(self._stored.shape)

    def __getitem__(self, key: object) -> Tensor:
        """The whole tensor, or a part of it."""
        block, self._block = self._block, torch.empty(0)
        memory = memoryview(block.numpy().data)
        # Opened for each tensor, since the loader has several threads and a file one position.
        with self._stored.file.open("rb", buffering=0) as file:
            file.seek(self._stored.start)
            while len(memory):
                read = file.readinto(memory)
                if not read:
                    raise _damaged(self._stored.file, "it ends within a tensor")
                memory = memory[read:]
        tensor = block.view(self._stored.dtype).view(self._stored.shape)
        return tensor[key]  # type: ignore[index]  # as transformers asks


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model on disk, by key.

    Parameters
    ----------
    path : str
        Folder or hub name.
    tensors : dict of str to Stored
        From the headers of the files; no weights are read.
    """

    path: str
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: str) -> Checkpoint:
        """Reads the headers of a folder's or hub model's safetensors.

        Raises
        ------
        DataError
            When there are no safetensors, a file is truncated, or a file or tensor that the index
            names is missing.
        """
        index = _resolve(path, _INDEX)
        if index is not None:
            return cls(path, _indexed(path, index))
        whole = _resolve(path, _WHOLE)
        if whole is None:
            raise DataError(
                f"{path} holds no safetensors; save the model with save_pretrained, or record it "
                "without layer_by_layer"
            )
        return cls(path, _header(whole))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first tensor of floating point."""
        found = (one.dtype for one in self.tensors.values() if one.dtype.is_floating_point)
        return next(found, torch.float32)

    @contextmanager
    def unread(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors that can be read, once each, while the block runs; they share their memory."""
        wanted = {key: self.tensors[key] for key in keys}
        starts, total = {}, 0
        for key, stored in wanted.items():
            starts[key] = total
            total += -(-stored.n_bytes // _ALIGNED) * _ALIGNED
        block = torch.empty(total, dtype=torch.uint8)
        places = {key: block[start : start + wanted[key].n_bytes] for key, start in starts.items()}
        del block  # so that it goes when all that was read of it has gone
        yield {key: Unread(stored, places.pop(key)) for key, stored in wanted.items()}


def _header(file: Path) -> dict[str, Stored]:
    """Tensors of one file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length:
            raise _damaged(file, "it ends within its header")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            found = {key: _stored(file, 8 + length, entry) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise _damaged(file, f"its header says {cause}") from cause
    if any(one.start + one.n_bytes > size for one in found.values()):
        raise _damaged(file, f"it has {size} bytes, which is less than its header says")
    return found


def _stored(file: Path, first: int, entry: dict[str, Any]) -> Stored:
    start, end = (int(place) for place in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    found = Stored(file, first + start, shape, _DTYPES[entry["dtype"]])
    if start < 0 or end - start != found.n_bytes:
        raise ValueError(f"{end - start} bytes for {shape}")
    return found


def _damaged(file: Path, why: str) -> DataError:
    return DataError(f"{file} is truncated or damaged ({why}); download or save it again")


def _indexed(path: str, index: Path) -> dict[str, Stored]:
    """Tensors of all files of an index, each from the file that the index names."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError(f"{index} names no weights; download or save the model again")
    headers = {}
    for name in sorted({str(name) for name in named.values()}):
        file = _resolve(path, name)
        if file is None:
            raise DataError(
                f"{path} lacks {name}, which its index names; download or save the model again"
            )
        headers[name] = _header(file)
    for key, name in named.items():
        if key not in headers[name]:
            raise DataError(
                f"{name} in {path} lacks the weight {key}, which the index puts there; download or "
                "save the model again"
            )
    return {key: headers[name][key] for key, name in named.items()}


def _resolve(path: str, name: str) -> Path | None:
    """A file of a folder or hub model, or None if it is not there."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
