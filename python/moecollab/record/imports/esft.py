"""Routing that ESFT's scripts write: one text file per layer, one line per sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError
from moecollab.record.imports.dump import Dump, Findings, Options, Piece, read_bytes

NAME = re.compile(r"expert_weights_(\d+)\.txt")
LEAST = np.float32(2.0**-24)
"""What a weight is stored as that was written as 0: far below the four digits that are written."""


def read_esft(paths: Sequence[Path], options: Options) -> Dump:
    """Files ``expert_weights_<layer>.txt`` of one folder or several, a domain each.

    A line holds a sample: the expert ids of its tokens one after the other with tabs between, two
    tabs, then as many weights. Weights have four digits, so that small ones are written as 0.
    """
    if options.top_k is None:
        raise SettingsError("top_k", None, "given, since ESFT's files do not say (--top-k)")
    folders: dict[Path, dict[int, Path]] = {}
    for path in paths:
        found = NAME.fullmatch(path.name)
        if found:
            folders.setdefault(path.parent, {})[int(found[1])] = path
    if not folders:
        raise DataError(f"{paths[0]} and the rest are not named expert_weights_<layer>.txt")
    layers = sorted(next(iter(folders.values())))
    findings = Findings()
    pieces: list[Piece] = []
    for folder, files in folders.items():
        if sorted(files) != layers:
            raise DataError(f"{folder} has files of layers {sorted(files)}, others of {layers}")
        pieces += _folder(folder, [files[at] for at in layers], options, options.top_k, findings)
    return Dump(pieces=pieces, layers=tuple(layers), findings=findings)


def _folder(
    folder: Path, files: Sequence[Path], options: Options, top_k: int, findings: Findings
) -> list[Piece]:
    """The samples of one folder."""
    layers = [_layer(path, top_k) for path in files]
    pieces = []
    for path, samples in zip(files, layers, strict=True):
        if [len(ids) for ids, _ in samples] != [len(ids) for ids, _ in layers[0]]:
            raise DataError(
                f"{path} has samples of other lengths than {files[0]}; one of them is truncated"
            )
    for number in range(len(layers[0])):
        weights = np.stack([samples[number][1] for samples in layers], axis=1)
        findings.rounded_weights += int((weights == 0).sum())
        pieces.append(
            Piece(
                where=f"{folder} line {number + 1}",
                file=str(folder),
                domain=options.domain or folder.resolve().name,
                ids=np.stack([samples[number][0] for samples in layers], axis=1),
                weights=np.where(weights == 0, LEAST, weights),
            )
        )
    return pieces


def _layer(path: Path, top_k: int) -> list[tuple[NDArray[Any], NDArray[np.float32]]]:
    """Ids and weights of each sample in one layer: (n_tokens, top_k)."""
    lines = read_bytes(path).decode("ascii", errors="replace").splitlines()
    return [
        _line(line, f"{path} line {number + 1}", top_k)
        for number, line in enumerate(lines)
        if line.strip()
    ]


def _line(line: str, where: str, top_k: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    left, both, right = line.strip("\r\n").partition("\t\t")
    try:
        ids = np.array(left.split("\t"), dtype=np.int64)
        weights = np.array(right.split("\t"), dtype=np.float32)
    except ValueError as cause:
        raise DataError(
            f"{where} is not ids, two tabs and weights; it is damaged or of another kind"
        ) from cause
    if not both or len(ids) != len(weights) or len(ids) % top_k:
        raise DataError(
            f"{where} has {len(ids)} ids and {len(weights)} weights, expected as many of both and "
            f"a multiple of top_k = {top_k}; it is truncated, or correct --top-k"
        )
    return ids.reshape(-1, top_k), weights.reshape(-1, top_k)
