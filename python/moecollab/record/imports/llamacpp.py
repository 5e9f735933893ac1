"""Counts that tools around llama.cpp write: JSON sums and CSV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, SchemaError, SettingsError
from moecollab.record.corpus import DEFAULT_DOMAIN
from moecollab.record.imports.counting import Part, add_up, numbers
from moecollab.record.imports.dump import CountDump, Options, read_bytes
from moecollab.record.imports.json_objects import as_count, as_object, read_objects

JSON_SUMS = {"cnt": "count", "gate": "sum_weight", "sal": "sum_weighted_norm"}
CSV_SUMS = {"count": "count", "hits": "count", "weight": "sum_weight"}


def read_llamacpp(paths: Sequence[Path], options: Options) -> CountDump:
    """Sums per layer and expert as ``.json``, or rows of ``layer,expert`` as ``.csv``.

    JSON holds ``n_expert``, ``tokens`` and ``layers``: of each layer ``cnt`` (choices), and where
    recorded ``gate`` (sum of weights) and ``sal`` (sum of weight times output norm). A CSV row is
    one choice, or has ``count`` or ``hits``, and perhaps ``weight``; it does not say how many
    experts there are. Files are shards and add up.
    """
    parts = []
    for path in paths:
        if path.suffix == ".csv":
            parts.append(_csv(path, options))
        else:
            for _, where, value in read_objects([path]):
                parts.append(_json(where, value))
    return add_up(parts, options)


def _json(where: str, value: dict[str, Any]) -> Part:
    layers = as_object(value.get("layers"), f"{where} layers")
    n_experts = as_count(value.get("n_expert"), f"{where} n_expert")
    sums = {}
    for name, layer in layers.items():
        here = f"{where} layer {name}"
        found = as_object(layer, here)
        if not name.isdecimal():
            raise SchemaError(f"{here} is not named by its index; it is of another kind")
        sums[int(name)] = {
            ours: numbers(found[theirs], f"{here} {theirs}")
            for theirs, ours in JSON_SUMS.items()
            if theirs in found
        }
        for theirs, array in sums[int(name)].items():
            if n_experts not in (None, len(array)):
                raise DataError(f"{here} has {len(array)} of {theirs}, but n_expert is {n_experts}")
    domain = value.get("domain")
    return Part(
        where=where,
        domain=domain if isinstance(domain, str) and domain else DEFAULT_DOMAIN,
        sums=sums,
        n_tokens=as_count(value.get("tokens"), f"{where} tokens"),
    )


def _csv(path: Path, options: Options) -> Part:
    table = _table(path)
    columns = {ours: theirs for theirs, ours in CSV_SUMS.items() if theirs in table.columns}
    layer, expert = (_indices(table, name, path) for name in ("layer", "expert"))
    n_experts = options.experts
    if n_experts is None:
        raise SettingsError("experts", None, f"given, since {path.name} does not say (--experts)")
    if expert.max() >= n_experts:
        row = int(np.flatnonzero(expert >= n_experts)[0])
        raise DataError(
            f"{path} line {row + 2}: expert id {expert[row]}, but ids are in [0, {n_experts}); "
            "correct --experts"
        )
    sums = {}
    for index in np.unique(layer):
        mine = layer == index
        held = {"count": np.ones(int(mine.sum()))}
        held |= {
            ours: numbers(table[theirs].to_numpy()[mine], f"{path} layer {index} {theirs}")
            for ours, theirs in columns.items()
        }
        sums[int(index)] = {
            name: np.bincount(expert[mine], values, n_experts) for name, values in held.items()
        }
    return Part(where=str(path), domain=DEFAULT_DOMAIN, sums=sums)


def _table(path: Path) -> pl.DataFrame:
    """The rows of a CSV file, whose header may be missing when it holds single choices."""
    data = read_bytes(path)
    first = data.split(b"\n", 1)[0]
    headed = b"layer" in first
    try:
        table = pl.read_csv(
            io.BytesIO(data),
            has_header=headed,
            new_columns=None if headed else ["layer", "expert"],
            raise_if_empty=False,
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as cause:
        raise DataError(f"{path} is not a table between commas; it may be damaged") from cause
    if not {"layer", "expert"} <= set(table.columns):
        raise SchemaError(f"{path} has columns {table.columns}; layer and expert must be there")
    if not table.height:
        raise DataError(f"{path} holds no rows; record it again")
    return table


def _indices(table: pl.DataFrame, name: str, path: Path) -> NDArray[np.int64]:
    """A column of indices of at least 0."""
    column = table[name]
    if not column.dtype.is_integer() or column.null_count() or column.to_numpy().min() < 0:
        raise DataError(f"{path} holds values in {name} that are no indices; it may be truncated")
    return column.to_numpy().astype(np.int64)
