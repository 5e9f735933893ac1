"""Routing as plain arrays: NumPy ``.npz`` and long Parquet tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, SchemaError, ShapeError
from moecollab.record.imports.dump import (
    DAMAGED,
    Dump,
    Options,
    Piece,
    read_bytes,
    uint32s,
    whole_numbers,
)

NPZ_ARRAYS = (
    "topk_ids", "topk_weights", "seq_lens", "moe_layer_ids", "token_ids", "domains", "n_experts",
)  # fmt: skip
PARQUET_COLUMNS = ("sample", "position", "layer", "expert")


def read_npz(paths: Sequence[Path], options: Options) -> Dump:
    """Arrays ``topk_ids`` (n_tokens, n_layers, top_k) and, where there, their companions.

    ``topk_weights`` has the same shape; ``seq_lens`` (n_samples,) and ``domains`` (n_samples,) cut
    the tokens into samples, ``token_ids`` (n_tokens,) names them, ``moe_layer_ids`` (n_layers,)
    holds the model's own indices and ``n_experts`` the routed experts per layer. The domain is the
    file's name where nothing else says it.
    """
    files = [_load_npz(path) for path in paths]
    pieces = [
        piece for path, arrays in zip(paths, files, strict=True)
        for piece in _npz_pieces(path, arrays, options)
    ]  # fmt: skip
    found = [_flat(path, f, "moe_layer_ids") for path, f in zip(paths, files, strict=True)]
    experts = [_flat(path, f, "n_experts") for path, f in zip(paths, files, strict=True)]
    if any(len(number) > 1 for number in experts):
        raise ShapeError(f"{paths[0]} and the rest have several n_experts, expected one number")
    return Dump(
        pieces=pieces,
        layers=_one([layers for layers in found if layers], "layers", paths),
        n_experts=_one([n for number in experts for n in number], "numbers of experts", paths),
    )


def _one(found: Sequence[Any], what: str, paths: Sequence[Path]) -> Any:  # noqa: ANN401
    """What all files agree on, or None when none says."""
    if len(set(found)) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{names} have different {what}; import each model's files on their own")
    return found[0] if found else None


def _flat(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> tuple[int, ...]:
    """The whole numbers of an array that may be missing."""
    found = whole_numbers(arrays.get(name, np.zeros(0, int)), f"{path} {name}")
    return tuple(int(number) for number in found.reshape(-1))


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    data = io.BytesIO(read_bytes(path))  # numpy leaves a damaged file open
    try:
        with np.load(data, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                return {"topk_ids": file}
            return {name: file[name] for name in NPZ_ARRAYS if name in file.files}
    except DAMAGED as cause:
        raise DataError(
            f"{path} is truncated, damaged or holds Python objects, which are not read; save plain "
            "arrays with numpy.savez"
        ) from cause


def _npz_pieces(path: Path, arrays: dict[str, NDArray[Any]], options: Options) -> list[Piece]:
    if "topk_ids" not in arrays:
        raise SchemaError(f"{path} lacks the array topk_ids; docs/importing.md names them all")
    ids = arrays["topk_ids"]
    if ids.ndim != 3:
        raise ShapeError(
            f"{path} has topk_ids of shape {ids.shape}, expected (tokens, layers, top_k); "
            "record it again"
        )
    lengths = np.array(_flat(path, arrays, "seq_lens") if "seq_lens" in arrays else [len(ids)])
    weights, tokens = arrays.get("topk_weights"), arrays.get("token_ids")
    domains = arrays.get("domains", np.full(len(lengths), path.stem))
    _check_npz(path, ids, weights, lengths, domains)
    if tokens is not None and tokens.shape != ids.shape[:1]:
        raise ShapeError(f"{path} has token_ids of shape {tokens.shape} for {len(ids)} rows")
    ends = np.cumsum(lengths)
    pieces = []
    for number, (start, stop) in enumerate(zip(ends - lengths, ends, strict=True)):
        own = slice(int(start), int(stop))
        where = f"{path} sample {number}"
        pieces.append(
            Piece(
                where=where,
                file=str(path),
                domain=options.domain or str(domains[number]),
                ids=ids[own],
                weights=None if weights is None else weights[own].astype(np.float32),
                token_ids=None if tokens is None else uint32s(tokens[own], where),
            )
        )
    return [piece for piece in pieces if len(piece.ids)]


def _check_npz(
    path: Path,
    ids: NDArray[Any],
    weights: NDArray[Any] | None,
    lengths: NDArray[Any],
    domains: NDArray[Any],
) -> None:
    """Raises unless the arrays beside the ids have the shapes that go with them."""
    if (lengths < 0).any() or int(lengths.sum()) != len(ids):
        raise ShapeError(
            f"{path} has seq_lens that add up to {int(lengths.sum())}, but {len(ids)} rows of "
            "routing; record it again"
        )
    if domains.shape != lengths.shape:
        raise ShapeError(f"{path} has domains of shape {domains.shape}, not {lengths.shape}")
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind not in "fiu"):
        raise ShapeError(
            f"{path} has {weights.dtype} weights of shape {weights.shape} for ids of shape "
            f"{ids.shape}; record it again"
        )


def read_parquet(paths: Sequence[Path], options: Options) -> Dump:
    """One row per token and layer: sample, position, layer, expert and what else is there.

    ``expert`` is a list of ids; ``weight`` a list of as many numbers; ``token_id`` and ``domain``
    may be there. Every token has a row for every layer.
    """
    pieces: list[Piece] = []
    found = []
    for path in paths:
        table = _load_parquet(path)
        layers = sorted(table["layer"].unique().to_list())
        found.append(tuple(int(layer) for layer in layers))
        for key, part in table.group_by("sample", maintain_order=True):
            pieces.append(_parquet_piece(path, str(key[0]), part, len(layers), options))
    return Dump(pieces=pieces, layers=_one(found, "layers", paths))


def _load_parquet(path: Path) -> pl.DataFrame:
    read_bytes(path)
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as cause:
        raise DataError(f"{path} is truncated or damaged; record the routing again") from cause
    missing = [name for name in PARQUET_COLUMNS if name not in table.columns]
    if missing:
        raise SchemaError(f"{path} lacks the columns {missing}; docs/importing.md names them all")
    if not table.height:
        raise DataError(f"{path} holds no rows; record the routing again")
    if not (table["layer"].dtype.is_integer() and table["position"].dtype.is_integer()):
        raise SchemaError(f"{path} has layers or positions that are not whole numbers")
    if table.select(pl.any_horizontal(pl.all().is_null().any())).item():
        raise DataError(f"{path} holds missing values; write -1 for an expert that is not known")
    return table.sort("sample", "position", "layer", maintain_order=True)


def _parquet_piece(
    path: Path, sample: str, part: pl.DataFrame, n_layers: int, options: Options
) -> Piece:
    where = f"{path} sample {sample}"
    sizes = part.group_by("position", maintain_order=True).agg(
        pl.col("layer").n_unique().alias("n")
    )
    if part.height != sizes.height * n_layers or sizes["n"].min() != n_layers:
        raise DataError(f"{where} lacks layers of some tokens or has some twice; record it again")
    tokens = part.gather_every(n_layers)
    domain = str(tokens["domain"][0]) if "domain" in part.columns else path.stem
    known = tokens["token_id"].to_numpy() if "token_id" in part.columns else None
    return Piece(
        where=where,
        file=str(path),
        domain=options.domain or domain,
        ids=_nested(part["expert"], n_layers, where),
        weights=(
            _nested(part["weight"], n_layers, where).astype(np.float32)
            if "weight" in part.columns
            else None
        ),
        token_ids=None if known is None else uint32s(known, where),
        positions=uint32s(tokens["position"].to_numpy(), f"{where} position"),
    )


def _nested(column: pl.Series, n_layers: int, where: str) -> NDArray[Any]:
    """A column of lists as an array (n_tokens, n_layers, n_slots)."""
    if isinstance(column.dtype, pl.List):
        widths = column.list.len().unique().to_list()
        if len(widths) != 1 or not widths[0]:
            raise ShapeError(f"{where}: lists in {column.name} have lengths {sorted(widths)}")
        column = column.list.to_array(widths[0])
    if not isinstance(column.dtype, pl.Array):
        raise SchemaError(f"{where}: {column.name} is {column.dtype}, expected a list of numbers")
    values = column.to_numpy()
    return values.reshape(-1, n_layers, values.shape[-1])
