"""Router traces of Megatron-Core: a JSON line per step, layer and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SchemaError, ShapeError
from moecollab.record.corpus import DEFAULT_DOMAIN
from moecollab.record.imports.dump import Dump, Findings, Options, Piece, whole_numbers
from moecollab.record.imports.json_objects import as_count, read_objects

Batch: TypeAlias = tuple[Path, int, int, int]
"""File, rank, step and micro-batch: what ran through the layers together."""


def read_megatron(paths: Sequence[Path], options: Options) -> Dump:
    """Files ``router_trace_rank<r>.jsonl`` with ``top_indices`` (num_tokens, topk) a line.

    A trace names neither tokens nor samples: what a rank ran at once is taken as one sample, in the
    order it was run. A layer that comes again in a step begins the next micro-batch. Layers of
    multi-token prediction are left out. A layer that a batch lacks is -1 there.
    """
    findings = Findings()
    batches: dict[Batch, dict[int, NDArray[Any]]] = {}
    seen: dict[tuple[Path, int, int, int], int] = {}
    for path, where, line in read_objects(paths):
        if line.get("block", "decoder") != "decoder" or line.get("mtp_idx") is not None:
            findings.other_passes += 1
            continue
        rank, step, layer = (_number(line, name, where) for name in ("rank", "step", "layer"))
        again = seen.get((path, rank, step, layer), 0)
        seen[path, rank, step, layer] = again + 1
        batch = batches.setdefault((path, rank, step, again), {})
        batch[layer] = _ids(line, where)
    layers = tuple(sorted({layer for batch in batches.values() for layer in batch}))
    pieces = [_piece(key, batch, layers, options) for key, batch in batches.items()]
    pieces = [piece for piece in pieces if len(piece.ids)]
    _check_shared(pieces, layers)
    return Dump(pieces=pieces, layers=layers or None, findings=findings)


def _number(line: Mapping[str, Any], name: str, where: str) -> int:
    value = as_count(line.get(name), f"{where} {name}")
    if value is None:
        raise SchemaError(f"{where} has no {name}; give router traces of Megatron-Core")
    return value


def _ids(line: Mapping[str, Any], where: str) -> NDArray[Any]:
    """Expert ids of one layer: (num_tokens, topk)."""
    shape = (_number(line, "num_tokens", where), _number(line, "topk", where))
    ids = whole_numbers(line.get("top_indices"), where)
    if ids.shape != shape and not (ids.size == 0 and shape[0] == 0):
        raise ShapeError(
            f"{where} has top_indices of shape {ids.shape}, but says {shape}; it is truncated"
        )
    return ids.astype(np.int64).reshape(shape)


def _piece(
    key: Batch, batch: Mapping[int, NDArray[Any]], layers: Sequence[int], options: Options
) -> Piece:
    path, rank, step, again = key
    where = f"{path} rank {rank} step {step} micro-batch {again}"
    shapes = {ids.shape for ids in batch.values()}
    if len(shapes) != 1:
        raise ShapeError(f"{where} has layers of shapes {sorted(shapes)}; its lines are mixed up")
    absent = np.full(next(iter(shapes)), -1)
    return Piece(
        where=where,
        file=str(path),
        domain=options.domain or DEFAULT_DOMAIN,
        ids=np.stack([batch.get(layer, absent) for layer in layers], axis=1),
    )


def _check_shared(pieces: Sequence[Piece], layers: Sequence[int]) -> None:
    """Raises when no batch has all layers, as ranks of a pipeline have not."""
    if pieces and all((piece.ids == -1).all(axis=(0, 2)).any() for piece in pieces):
        raise DataError(
            f"{pieces[0].file} and its like hold layers {list(layers)} but no batch with all of "
            "them: ranks of a pipeline cannot be joined, and graphs that are replayed trace "
            "nothing; record on one pipeline stage with --cuda-graph-impl none"
        )
