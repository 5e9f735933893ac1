"""Sums from foreign files: adding shards up, and the folder they end in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError, ShapeError
from moecollab.manifest import MANIFEST, manifest, new_folder, write_json
from moecollab.record.counts import KIND, VERSION, RoutingCounts, load_counts
from moecollab.record.imports.dump import CountDump, Findings, Options
from moecollab.record.schema import TALLIES
from moecollab.record.sums import SCALARS
from moecollab.record.tallies import Tallies

NAMES = SCALARS
MAX_COUNT = 2.0**53  # whole numbers above it are not exact in float64


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one file or domain counted.

    Parameters
    ----------
    where, domain : str
        For messages, and what the sums belong to.
    sums : mapping of layer to mapping of name to array
        By the model's own layer index, then by name in `NAMES`; arrays (n_experts,).
    n_tokens : int or None
        Tokens that were counted.
    """

    where: str
    domain: str
    sums: Mapping[int, Mapping[str, NDArray[Any]]]
    n_tokens: int | None = None


def numbers(value: object, where: str) -> NDArray[np.float64]:
    """Sums of one layer as float64; they are finite and not negative."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as cause:
        raise DataError(f"{where} is not a list of numbers; record it again") from cause
    if array.ndim != 1 or not array.size:
        raise ShapeError(f"{where} has shape {array.shape}, expected one number per expert")
    if not (np.isfinite(array) & (array >= 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(array) & (array >= 0)))[0])
        raise DataError(
            f"{where}: expert {bad} has {array[bad]}, but sums are finite and not below 0"
        )
    return array


def add_up(parts: list[Part], options: Options) -> CountDump:
    """The sums of all parts: those of one domain are added, as shards of a run are.

    Raises
    ------
    DataError
        When parts hold different layers or experts, or counts are not whole numbers.
    """
    if not parts:
        raise DataError("the files hold no counts; record them again")
    layers = tuple(sorted(parts[0].sums))
    if not layers:
        raise DataError(f"{parts[0].where} holds no layers; record it again")
    recorded = _recorded(parts)
    n_experts = options.experts or max(_widths(part) for part in parts)
    domains = tuple(sorted({options.domain or part.domain for part in parts}))
    shape = (len(domains), len(layers), n_experts)
    sums = {name: np.zeros(shape) for name in recorded}
    for part in parts:
        if tuple(sorted(part.sums)) != layers:
            raise DataError(f"{part.where} holds layers {sorted(part.sums)}, others {list(layers)}")
        at = domains.index(options.domain or part.domain)
        for row, layer in enumerate(layers):
            _add(part, layer, {name: sums[name][at, row] for name in recorded})
    known = [part.n_tokens for part in parts if part.n_tokens is not None]
    return CountDump(
        tallies=Tallies(domains, sums | {"count": sums["count"].astype(np.int64)}),
        layers=options.layers or layers,
        n_tokens=sum(known) if len(known) == len(parts) else None,
        recorded=recorded,
    )


def _recorded(parts: list[Part]) -> tuple[str, ...]:
    """Sums that every part holds in every layer."""
    held = [set(sums) for part in parts for sums in part.sums.values()]
    common = set.intersection(*held) if held else set()
    if "count" not in common:
        raise DataError(f"{parts[0].where} or a file beside it lacks counts; record it again")
    return tuple(name for name in NAMES if name in common)


def _widths(part: Part) -> int:
    return max(len(array) for sums in part.sums.values() for array in sums.values())


def _add(part: Part, layer: int, into: Mapping[str, NDArray[np.float64]]) -> None:
    for name, target in into.items():
        array = part.sums[layer][name]
        if len(array) > len(target):
            raise DataError(
                f"{part.where} layer {layer} has {len(array)} experts, expected {len(target)}; "
                "correct --experts or import each model on its own"
            )
        if name == "count" and ((array != np.floor(array)) | (array > MAX_COUNT)).any():
            raise DataError(f"{part.where} layer {layer} has counts that are not whole numbers")
        target[: len(array)] += array


def write_counts(
    dump: CountDump, target: Path, options: Options, about: dict[str, Any], *, overwrite: bool
) -> RoutingCounts:
    """Writes a folder of sums; `about` says what it was made from."""
    n_layers, n_experts = dump.tallies.count.shape[-2:]
    if len(dump.layers) != n_layers:
        raise SettingsError("layers", dump.layers, f"{n_layers} indices, one for each layer")
    if not dump.tallies.count.sum():
        raise DataError("the files count no token; record the routing again")
    dump = replace(dump, findings=_uneven(dump, options))
    described = manifest(KIND, VERSION, settings=about["settings"], inputs=about["inputs"])
    described["model"] = {
        "class": f"imported from {about['kind']}",
        "model_type": about["kind"],
        "layers": list(dump.layers),
        "n_experts": n_experts,
        "top_k": _top_k(dump, options),
    }
    described["domains"] = list(dump.tallies.domains)
    described["recorded"] = list(dump.recorded)
    described["imported"] = {"kind": about["kind"], "findings": dump.findings.counted()}
    with new_folder(target, overwrite=overwrite) as folder:
        dump.tallies.save(folder / TALLIES)
        write_json(folder / MANIFEST, described)
    return load_counts(target)


def _top_k(dump: CountDump, options: Options) -> int:
    """Experts per token: as said, or choices per token and layer where tokens were counted."""
    if options.top_k is not None:
        return options.top_k
    if not dump.n_tokens:
        raise SettingsError("top_k", None, "given, since the files do not count tokens (--top-k)")
    choices = int(dump.tallies.count.sum(axis=(0, 2)).max())
    if choices % dump.n_tokens:
        raise DataError(
            f"the files count {choices} choices of {dump.n_tokens} tokens, which is no whole "
            "number of experts per token; say --top-k, or record them again"
        )
    return choices // dump.n_tokens


def _uneven(dump: CountDump, options: Options) -> Findings:
    """Findings with the layers whose choices are fewer or more than another's."""
    if dump.n_tokens is None and options.top_k is None:
        return dump.findings
    choices = dump.tallies.count.sum(axis=(0, 2))
    wanted = choices.max() if dump.n_tokens is None else dump.n_tokens * _top_k(dump, options)
    return replace(dump.findings, uneven_layers=int((choices != wanted).sum()))
