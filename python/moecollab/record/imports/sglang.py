"""Files of SGLang's expert distribution recorder (``.pt``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SchemaError, ShapeError
from moecollab.record.corpus import DEFAULT_DOMAIN
from moecollab.record.imports.counting import Part, add_up, numbers
from moecollab.record.imports.dump import CountDump, Dump, Findings, Options, Piece, uint32s
from moecollab.record.imports.tensors import as_array, load_tensors

DECODE, IDLE = 2, 4  # values of SGLang's ForwardMode


def read_sglang(paths: Sequence[Path], options: Options) -> Dump | CountDump:
    """Files of the modes ``per_token`` (rows) or ``stat`` (counts), one for each rank.

    Ids are physical; the map beside them makes them logical. A prefill pass is cut into its
    sequences. A decode pass names no request: as long as the batch keeps its size, tokens in the
    same place whose positions go on by one from pass to pass are taken as one sample.
    """
    loaded = [(path, _load(path)) for path in paths]
    if all("logical_count" in file for _, file in loaded):
        return add_up([_counted(path, file) for path, file in loaded], options)
    if not all("records" in file for _, file in loaded):
        raise SchemaError(
            "some files are of mode stat, others hold records; import each on its own"
        )
    findings = Findings()
    pieces: list[Piece] = []
    n_experts = 0
    for path, file in loaded:
        logical = _logical(path, file)
        n_experts = max(n_experts, int(logical.max()) + 1)
        pieces += _File(path, logical, options, findings).pieces(file["records"])
    return Dump(pieces=pieces, n_experts=options.experts or n_experts, findings=findings)


def _load(path: Path) -> dict[str, Any]:
    file = load_tensors(path)
    if not isinstance(file, dict) or not {"records", "logical_count"} & set(file):
        raise SchemaError(
            f"{path} holds neither records nor logical_count; give files of SGLang's recorder in "
            "mode per_token or stat"
        )
    return file


def _counted(path: Path, file: Mapping[str, Any]) -> Part:
    """Counts of mode ``stat``: (n_steps, n_layers, n_experts)."""
    counts = as_array(file["logical_count"], f"{path} logical_count")
    if counts.ndim != 3 or not counts.size:
        raise ShapeError(f"{path} has logical_count of shape {counts.shape}, expected three axes")
    total = counts.sum(axis=0)
    sums = {
        layer: {"count": numbers(row, f"{path} layer {layer}")}
        for layer, row in enumerate(total)
        if row.any()  # dense layers count nothing
    }
    return Part(where=str(path), domain=DEFAULT_DOMAIN, sums=sums)


def _logical(path: Path, file: Mapping[str, Any]) -> NDArray[np.int64]:
    """Logical id of each physical expert: (n_layers, n_physical)."""
    found = file.get("last_physical_to_logical_map")
    if found is None:
        raise DataError(
            f"{path} holds physical ids without a map to logical ones; record it with a version of "
            "SGLang that writes last_physical_to_logical_map"
        )
    logical = as_array(found, f"{path} last_physical_to_logical_map")
    if logical.ndim != 2 or logical.dtype.kind not in "iu" or not logical.size or logical.min() < 0:
        raise ShapeError(
            f"{path} has a last_physical_to_logical_map of shape {logical.shape}, expected ids of "
            "shape (layers, physical experts)"
        )
    return logical.astype(np.int64)


class _File:
    """One rank's records, read in the order of the passes."""

    def __init__(
        self, path: Path, logical: NDArray[np.int64], options: Options, findings: Findings
    ) -> None:
        self.path = path
        self.logical = logical
        self.findings = findings
        self.domain = options.domain or DEFAULT_DOMAIN
        self.running: dict[int, list[Piece]] = {}
        self.done: list[Piece] = []

    def pieces(self, records: object) -> list[Piece]:
        """Samples of all records."""
        if not isinstance(records, list | tuple):
            raise SchemaError(f"{self.path} has no list of records; it is of another kind")
        for number, record in enumerate(records):
            where = f"{self.path} record {number}"
            if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
                raise SchemaError(
                    f"{where} has no topk_ids_of_layer; use the recorder's mode per_token for "
                    "rows, stat for counts"
                )
            self._read(record, where)
        self._finish(set(self.running))
        return self.done

    def _read(self, record: Mapping[str, Any], where: str) -> None:
        lengths, mode = record.get("extend_seq_lens"), record.get("forward_mode")
        passed = self._pass(record, where)
        if passed is None:
            return
        if lengths is not None:
            self._finish(set(self.running))
            self.done.extend(_cut(passed, lengths, where))
        elif mode == DECODE:
            self._go_on(passed)
        elif mode != IDLE:
            self.findings.other_passes += 1

    def _pass(self, record: Mapping[str, Any], where: str) -> Piece | None:
        """All tokens of a pass, or None when there are none."""
        ids = as_array(record["topk_ids_of_layer"], f"{where} topk_ids_of_layer")
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or len(ids) != len(self.logical):
            raise ShapeError(
                f"{where} has topk_ids_of_layer of shape {ids.shape}, expected "
                f"({len(self.logical)}, tokens, slots) as the map has layers"
            )
        if not ids.shape[1]:
            return None
        names = as_array(record.get("input_ids", []), f"{where} input_ids")
        places = as_array(record.get("positions", []), f"{where} positions")
        return Piece(
            where=where,
            file=str(self.path),
            domain=self.domain,
            ids=np.ascontiguousarray(self._mapped(ids, where).transpose(1, 0, 2)),
            token_ids=uint32s(names, f"{where} input_ids"),
            positions=uint32s(places, f"{where} positions"),
            generated=np.full(ids.shape[1], record.get("forward_mode") == DECODE),
        )

    def _mapped(self, ids: NDArray[Any], where: str) -> NDArray[np.int32]:
        """Logical ids; -1 stays."""
        n_physical = self.logical.shape[1]
        if ids.min() < -1 or ids.max() >= n_physical:
            bad = int(ids.max() if ids.max() >= n_physical else ids.min())
            raise DataError(
                f"{where} holds expert {bad}, but its map has {n_physical} physical ones"
            )
        layer = np.arange(len(ids))[:, None, None]
        return np.where(ids < 0, -1, self.logical[layer, np.maximum(ids, 0)]).astype(np.int32)

    def _go_on(self, passed: Piece) -> None:
        """Adds each token of a decode pass to its place's sample, or begins one."""
        positions = np.asarray(passed.positions)
        if len(self.running) != len(positions):
            self._finish(set(self.running))  # a request came or went, and places may have moved
        for place, token in enumerate(_cut(passed, [1] * len(positions), passed.where)):
            before = self.running.get(place)
            if before is not None and np.asarray(before[-1].positions)[0] + 1 != positions[place]:
                self._finish({place})
            self.running.setdefault(place, []).append(token)

    def _finish(self, places: set[int]) -> None:
        for place in sorted(places):
            self.done.append(_joined(self.running.pop(place)))


def _cut(passed: Piece, lengths: Sequence[Any], where: str) -> Iterator[Piece]:
    """The sequences of a pass."""
    sizes = as_array(lengths, f"{where} extend_seq_lens")
    if (
        not sizes.size
        or sizes.dtype.kind not in "iu"
        or sizes.min() < 0
        or int(sizes.sum()) != len(passed.ids)
    ):
        raise DataError(
            f"{where} has sequences of {sizes.tolist()} tokens, but {len(passed.ids)} rows; it is "
            "damaged or of another version"
        )
    sizes = sizes.reshape(-1)
    ends = np.cumsum(sizes)
    for number, (start, stop) in enumerate(zip(ends - sizes, ends, strict=True)):
        own = slice(int(start), int(stop))
        yield Piece(
            where=f"{passed.where} sequence {number}",
            file=passed.file,
            domain=passed.domain,
            ids=passed.ids[own],
            token_ids=np.asarray(passed.token_ids)[own],
            positions=np.asarray(passed.positions)[own],
            generated=np.asarray(passed.generated)[own],
        )


def _joined(tokens: Sequence[Piece]) -> Piece:
    """One sample of consecutive tokens."""
    return Piece(
        where=tokens[0].where,
        file=tokens[0].file,
        domain=tokens[0].domain,
        ids=np.concatenate([token.ids for token in tokens]),
        token_ids=np.concatenate([np.asarray(token.token_ids) for token in tokens]),
        positions=np.concatenate([np.asarray(token.positions) for token in tokens]),
        generated=np.concatenate([np.asarray(token.generated) for token in tokens]),
    )
