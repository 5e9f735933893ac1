"""Columns and file names of recorded activations; the one place that knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl
from polars.io.plugins import register_io_source

from moecollab.errors import DataError, SchemaError

KIND = "activations"
VERSION = 1
COUNTS_KIND = "routing_counts"
TOKENS = "tokens.parquet"
SAMPLES = "samples.parquet"
VOCABULARY = "vocabulary.parquet"
FOLDS = "folds.safetensors"
TALLIES = "tallies.safetensors"
ROW_GROUP = 65_536
"""Rows in a row group: what a reader must hold at once."""

TOKEN_COLUMNS: dict[str, pl.DataType] = {
    "token": pl.UInt32(),
    "sample": pl.UInt32(),
    "position": pl.UInt32(),
    "token_id": pl.UInt32(),
}
SAMPLE_COLUMNS: dict[str, pl.DataType] = {
    "sample": pl.UInt32(),
    "domain": pl.String(),
    "n_tokens": pl.UInt32(),
    "text_start": pl.String(),
}
VOCABULARY_COLUMNS: dict[str, pl.DataType] = {"token_id": pl.UInt32(), "text": pl.String()}


def layer_file(layer: int) -> str:
    """File name of one layer's table; `layer` is the model's own index."""
    return f"layer-{layer:03d}.parquet"


NO_EXPERT = 65_535
"""Fills up preferences of a layer with fewer experts than others."""


def n_preferences(n_experts: int, top_k: int) -> int:
    """Experts of a token that are recorded as what its router would choose next."""
    return min(2 * top_k, n_experts - top_k)


def layer_columns(top_k: int, *, norms: bool, n_next: int = 0) -> dict[str, pl.DataType]:
    """Columns of a layer's table."""
    columns: dict[str, pl.DataType] = {
        "token": pl.UInt32(),
        "sample": pl.UInt32(),
        "position": pl.UInt32(),
        "expert": pl.Array(pl.UInt16(), top_k),
        "weight": pl.Array(pl.Float32(), top_k),
    }
    if norms:
        columns["norm"] = pl.Array(pl.Float32(), top_k)
    if n_next:
        columns["next"] = pl.Array(pl.UInt16(), n_next)
    return columns


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Writes Parquet; the same table gives the same bytes."""
    table.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP)


def write_parts(parts: Iterable[pl.DataFrame], columns: dict[str, pl.DataType], path: Path) -> None:
    """Writes consecutive parts of a table as it would be written whole, a few at a time."""
    failed: list[DataError] = []

    def read(*_wishes: object) -> Iterator[pl.DataFrame]:  # nothing narrower is ever asked for
        try:
            yield from parts
        except DataError as error:  # Polars would make it one of its own
            failed.append(error)
            raise

    table = register_io_source(read, schema=columns)
    try:
        table.sink_parquet(path, compression="zstd", row_group_size=ROW_GROUP, maintain_order=True)
    except pl.exceptions.PolarsError:
        if failed:
            raise failed[0] from None
        raise


def check_table(path: Path, columns: dict[str, pl.DataType], n_rows: int | None = None) -> None:
    """Raises unless a Parquet file is whole and has these columns and this many rows.

    Only the footer is read.
    """
    try:
        found = dict(pl.read_parquet_schema(path))
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist; record the activations again") from cause
    except (pl.exceptions.PolarsError, OSError) as cause:
        raise DataError(f"{path} is truncated or damaged; record the activations again") from cause
    if found != columns:
        wanted = ", ".join(f"{name} {dtype}" for name, dtype in columns.items())
        got = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise SchemaError(f"{path} has columns {got}; expected {wanted}: record again")
    if n_rows is not None and rows != n_rows:
        raise DataError(f"{path} has {rows} rows, expected {n_rows}; record the activations again")
