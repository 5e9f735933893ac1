"""What layers give, between one layer and the next: in memory, and on disk where it is too much."""

from __future__ import annotations

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moecollab.errors import DataError


class Shelf:
    """Tensors by number, put back again and again.

    Files are read and written, not mapped: a full disk is then an error and not a signal that ends
    the process, and the system caches them all the same.

    Parameters
    ----------
    folder : Path
        Where goes what is too much for memory; removed in the end.
    most : int
        Bytes that may be held in memory.
    device : device
        Where the tensors are needed.
    """

    def __init__(self, folder: Path, most: int, device: torch.device) -> None:
        self.folder = folder
        self.most = most
        self.device = device
        self.held = 0
        self.spilled: dict[int, int] = {}
        self._held: dict[int, Any] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_error: object) -> None:
        self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, number: int, given: Any) -> None:  # noqa: ANN401 (tensors in any order)
        """Keeps tensors, in place of those that had the number."""
        size = _bytes(given)
        self.held -= _bytes(self._held.pop(number, None))
        if self.held + size <= self.most:
            self._held[number] = tree_map(_alone, given)
            self.held += size
        else:
            self._spill(number, given, size)

    def get(self, number: int) -> Any:  # noqa: ANN401
        """The tensors of a number, or None."""
        if number in self._held:
            found = self._held[number]
        elif number in self.spilled:
            found = self._load(number)
        else:
            return None
        return tree_map(lambda one: one.to(self.device) if isinstance(one, Tensor) else one, found)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.pt"

    def _load(self, number: int) -> Any:  # noqa: ANN401
        try:
            return torch.load(self._file(number), weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as cause:
            raise DataError(
                f"{self._file(number)}, which holds hidden states of this run, is missing or "
                "damaged; run extract again: it goes on where it stopped"
            ) from cause

    def _spill(self, number: int, given: Any, size: int) -> None:  # noqa: ANN401
        try:
            self.folder.mkdir(exist_ok=True)
            with self._file(number).open("wb") as file:
                torch.save(tree_map(_alone, given), file)
        except (OSError, RuntimeError) as cause:
            reason = str(cause).strip().splitlines()[0]
            raise DataError(
                f"hidden states cannot be written to {self.folder} ({reason}); make room there or "
                "raise hidden_gb, and run extract again: it goes on where it stopped"
            ) from cause
        self.spilled[number] = size


def _bytes(given: Any) -> int:  # noqa: ANN401
    return sum(one.nbytes for one in tree_leaves(given) if isinstance(one, Tensor))


def _alone(value: object) -> object:
    """A tensor in host memory that is no view of something larger."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
