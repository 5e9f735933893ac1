"""The safetensors of a model on disk: what they hold, and reading a few tensors of them.

Files are read and not mapped, into one block for all tensors that are wanted: a mapped file counts
with all its bytes against a limit, and thousands of small tensors leave holes when they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from moecollab.errors import DataError
from moecollab.manifest import read_json
from moecollab.models.headers import Stored, damaged, read_header

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ALIGNED = 64  # bytes; what any type of number may start at


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
                    raise damaged(self._stored.file, "it ends within a tensor")
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
    metadata : dict of str to str
        What the first file says of itself.
    """

    path: str
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str) -> Checkpoint:
        """Reads the headers of a folder's or hub model's safetensors.

        Raises
        ------
        DataError
            When there are no safetensors, a file is damaged, lies outside the folder or holds a
            tensor that another holds too, or one that the index names is missing.
        """
        whole = _resolve(path, _WHOLE)  # which transformers prefers, if there are both
        if whole is not None:
            return cls(path, *read_header(whole))
        index = _resolve(path, _INDEX)
        if index is None:
            raise DataError(f"{path} holds no safetensors; save the model with save_pretrained")
        return cls(path, *_indexed(path, index))

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


def _indexed(path: str, index: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors of all files of an index, those that it forgets too, and the first one's metadata."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError(f"{index} names no weights; download or save the model again")
    found: dict[str, Stored] = {}
    notes = []
    for name in sorted({str(name) for name in named.values()}):
        file = _resolve(path, name)
        if file is None:
            raise DataError(
                f"{path} lacks {name}, which its index names; download or save the model again"
            )
        tensors, metadata = read_header(file)
        _check_indexed(path, name, tensors, {key for key in named if named[key] == name}, found)
        found |= tensors
        notes.append(metadata)
    return found, notes[0]


def _check_indexed(
    path: str, name: str, tensors: dict[str, Stored], named: set[str], others: dict[str, Stored]
) -> None:
    """Refuses a file without what the index puts there, or with what another file has."""
    for key in sorted(named - set(tensors)):
        raise DataError(
            f"{name} in {path} lacks the weight {key}, which the index puts there; download or "
            "save the model again"
        )
    for key in sorted(set(tensors) & set(others)):
        raise DataError(
            f"{path} holds the weight {key} twice, in {others[key].file.name} and in {name}; "
            "download or save the model again"
        )


def _resolve(path: str, name: str) -> Path | None:
    """A file of a folder or hub model, or None if it is not there."""
    if Path(path).is_dir():
        return file_inside(Path(path), name)
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def file_inside(folder: Path, name: str) -> Path | None:
    """A file that a folder holds by a name from outside, or None if it is not there.

    Links may lead to the blobs of a snapshot in the cache of the hub, which is how it keeps files,
    but nowhere else outside.

    Raises
    ------
    DataError
        When the name or a link leads out of the folder.
    """
    file = folder / name
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    outside = Path(name).is_absolute() or ".." in Path(name).parts
    if not outside and not file.is_file():
        return None
    if outside or not any(file.resolve().is_relative_to(root) for root in roots):
        raise DataError(
            f"{folder} names the file {name}, which lies outside it; download the model again, or "
            "copy the file there if you trust it"
        )
    return file
