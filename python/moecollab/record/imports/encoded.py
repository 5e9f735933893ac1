"""Expert ids as responses of servers hold them: nested lists, or bytes in base64."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, ShapeError
from moecollab.record.imports.dump import DAMAGED, Options, whole_numbers
from moecollab.record.imports.json_objects import as_list, as_object

NPY = b"\x93NUMPY"
DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is known of bytes that do not describe themselves.

    Parameters
    ----------
    n_layers, top_k : int or None
        The last two axes.
    dtypes : tuple of str
        Types the numbers may have.
    n_rows : collection of int
        Numbers of rows that the tokens of the request allow; none if they are not known.
    """

    n_layers: int | None
    top_k: int | None
    dtypes: tuple[str, ...]
    n_rows: Collection[int] = ()

    @classmethod
    def of(cls, options: Options, dtypes: tuple[str, ...], n_rows: Collection[int]) -> Form:
        """What the options say."""
        n_layers = None if options.layers is None else len(options.layers)
        return cls(n_layers=n_layers, top_k=options.top_k, dtypes=dtypes, n_rows=n_rows)


def decode_ids(value: object, where: str, form: Form) -> NDArray[Any] | None:
    """Expert ids of shape (n_rows, n_layers, top_k), or None where there are none.

    A string is base64 of a ``.npy`` file or of bare numbers; an object holds base64 as ``data``
    beside ``shape`` and ``dtype``.
    """
    if value is None or value in ([], ""):
        return None
    if isinstance(value, str):
        data = _bytes(value, where)
        return _npy(data, where) if data.startswith(NPY) else _bare(data, where, form)
    if isinstance(value, dict):
        return _described(value, where)
    ids = whole_numbers(as_list(value, where), where)
    return _three_axes(ids, where)


def _three_axes(ids: NDArray[Any], where: str) -> NDArray[Any]:
    if ids.ndim != 3:
        raise ShapeError(
            f"{where} has ids of shape {ids.shape}, expected (tokens, layers, top_k); record "
            "it again"
        )
    return ids


def _bytes(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise DataError(f"{where} is not base64; it may be truncated: record it again") from cause


def _npy(data: bytes, where: str) -> NDArray[Any]:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except DAMAGED as cause:
        raise DataError(f"{where} is a truncated or damaged array; record it again") from cause
    return _three_axes(np.asarray(found), where)


def _described(value: dict[str, Any], where: str) -> NDArray[Any]:
    about = as_object(value, where)
    dtype, shape = about.get("dtype"), about.get("shape")
    if dtype not in DTYPES or not isinstance(about.get("data"), str):
        raise DataError(f"{where} lacks data, or its dtype {dtype!r} is not one of {DTYPES}")
    sizes = [int(n) for n in whole_numbers(shape, f"{where} shape").reshape(-1)]
    numbers = _numbers(_bytes(about["data"], where), np.dtype(dtype), where)
    if len(sizes) != 3 or min(sizes) < 0 or int(np.prod(sizes)) != len(numbers):
        raise ShapeError(f"{where} holds {len(numbers)} ids for shape {shape}; record it again")
    return numbers.reshape(sizes)


def _numbers(data: bytes, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise DataError(f"{where} has {len(data)} bytes, no multiple of {dtype}; it is truncated")
    return np.frombuffer(data, dtype=dtype.newbyteorder("<"))


def _bare(data: bytes, where: str, form: Form) -> NDArray[Any]:
    """Numbers without a shape: the one type whose number of rows fits the request's tokens."""
    if form.n_layers is None or form.top_k is None:
        raise DataError(
            f"{where} holds ids without their shape; say --layers (all that are in the file, dense "
            "ones too) and --top-k"
        )
    fitting = []
    for name in form.dtypes:
        size = np.dtype(name).itemsize * form.n_layers * form.top_k
        if len(data) % size == 0 and (not form.n_rows or len(data) // size in form.n_rows):
            fitting.append(name)
    if not fitting:
        rows = " or ".join(map(str, sorted(form.n_rows))) or "any number of"
        raise ShapeError(
            f"{where} has {len(data)} bytes of ids, which is not {' or '.join(form.dtypes)} for "
            f"{form.n_layers} layers × {form.top_k} experts and "
            f"{rows} rows; correct --layers and --top-k, or record it again"
        )
    return _numbers(data, np.dtype(fitting[0]), where).reshape(-1, form.n_layers, form.top_k)
