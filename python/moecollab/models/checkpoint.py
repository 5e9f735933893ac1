"""The safetensors of a model on disk: what they hold, and reading a few tensors of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from moecollab.errors import DataError
from moecollab.manifest import read_json

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk, as its file's header describes it.

    Parameters
    ----------
    file : Path
        Where it is.
    dtype : str
        Type in the words of safetensors, such as BF16.
    """

    file: Path
    dtype: str


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
            When there are no safetensors, or a file or a tensor that the index names is missing.
        """
        index = _resolve(path, _INDEX)
        if index is None:
            whole = _resolve(path, _WHOLE)
            if whole is None:
                raise DataError(
                    f"{path} holds no safetensors; save the model with save_pretrained, or record "
                    "it without layer_by_layer"
                )
            return cls(path, _header(whole))
        return cls(path, _indexed(path, index))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first tensor of floating point."""
        found = (_DTYPES[one.dtype] for one in self.tensors.values() if one.dtype in _DTYPES)
        return next(found, torch.float32)

    @contextmanager
    def slices(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Handles that read a tensor each when they are asked, while the block runs."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            found = {}
            for key in keys:
                file = self.tensors[key].file
                if file not in files:
                    files[file] = stack.enter_context(_open(file))
                found[key] = files[file].get_slice(key)
            yield found


def _open(file: Path) -> Any:  # noqa: ANN401 (safetensors is untyped)
    """A file whose tensors are read into memory of their own.

    A mapped file would count with all its bytes against a limit of address space.
    """
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # safetensors before 0.8
        return safe_open(file, framework="pt")


def _header(file: Path) -> dict[str, Stored]:
    with _open(file) as opened:
        found = {}
        for key in opened.keys():  # noqa: SIM118 (no dict)
            found[key] = Stored(file, opened.get_slice(key).get_dtype())
        return found


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
