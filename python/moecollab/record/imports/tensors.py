"""PyTorch files of plain values and tensors; nothing in them is ever run."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError
from moecollab.record.imports.dump import DAMAGED, read_bytes


def load_tensors(path: Path) -> Any:  # noqa: ANN401 (whatever the file holds)
    """What a ``.pt`` file holds, read without running what a pickle may ask for.

    Only numbers, strings, lists, tuples, dictionaries and tensors are built.

    Raises
    ------
    DataError
        When the file holds anything else, or is truncated or damaged.
    """
    import torch

    data = io.BytesIO(read_bytes(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats of old
            return torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise DataError(
            f"{path} holds objects that would have to be run to be read, which is refused, or is "
            "damaged; save plain tensors, lists and dictionaries"
        ) from cause
    except DAMAGED as cause:
        raise DataError(f"{path} is truncated or damaged; record the routing again") from cause


def as_array(value: object, where: str) -> NDArray[Any]:
    """A tensor or list of numbers as an array."""
    import torch

    try:
        if isinstance(value, torch.Tensor):
            plain = value.detach().to("cpu")
            array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        else:
            array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DataError(f"{where} is not a tensor of numbers; record it again") from cause
    if array.dtype.kind not in "iuf" and array.size:
        raise DataError(f"{where} holds {type(value).__name__}, expected a tensor; record it again")
    return array
