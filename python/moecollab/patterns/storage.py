"""A collaboration as a folder of safetensors and JSON."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moecollab.errors import DataError, SchemaError
from moecollab.manifest import (
    MANIFEST,
    check_manifest,
    dump_json,
    manifest,
    new_folder,
    read_json,
)
from moecollab.patterns.code_file import read_codes, write_codes
from moecollab.patterns.collaboration import Collaboration, Level

if TYPE_CHECKING:
    from collections.abc import Mapping

KIND, VERSION = "collaboration", 1
ATOMS, CODES, HISTORY = "atoms.safetensors", "codes.safetensors", "history.json"
Arrays: TypeAlias = dict[str, NDArray[Any]]


def write(collab: Collaboration, target: Path, *, overwrite: bool) -> None:
    """Writes the folder, whole or not at all."""
    seed = collab.settings.get("seed")
    about = manifest(
        KIND,
        VERSION,
        settings=collab.settings,
        inputs={} if collab.activations is None else {"activations": collab.activations},
        seed=seed if isinstance(seed, int) else None,
    )
    about |= {"stop_reason": collab.stop_reason, "n_levels": len(collab.levels)}
    about["model"] = {"layers": list(collab.layers), "n_experts": collab.n_experts}
    with new_folder(target, overwrite=overwrite) as folder:
        (folder / ATOMS).write_bytes(save(_arrays(collab)))
        write_codes(folder / CODES, lambda: [collab.codes])
        (folder / HISTORY).write_bytes(dump_json({"history": list(collab.history)}))
        (folder / MANIFEST).write_bytes(dump_json(about))


def _arrays(collab: Collaboration) -> Arrays:
    found: Arrays = {}
    for number, level in enumerate(collab.levels, start=1):
        for name in ("atoms", "usage", "peak", "links"):
            array = getattr(level, name)
            if array is not None:
                found[f"level{number}.{name}"] = np.ascontiguousarray(array)
    return found


def load_collaboration(path: str | PathLike[str]) -> Collaboration:
    """Reads a collaboration from its folder, after checking that it is whole.

    Raises
    ------
    DataError
        When a file is missing, truncated or damaged.
    SchemaError
        When the folder is of another kind or version, or an array has another shape or type.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no collaboration (no {MANIFEST}); make one with fit")
    about = read_json(folder / MANIFEST)
    check_manifest(about, KIND, VERSION, folder)
    history = read_json(folder / HISTORY)
    try:
        layers = tuple(int(layer) for layer in about["model"]["layers"])
        n_experts, n_levels = int(about["model"]["n_experts"]), int(about["n_levels"])
        rows = tuple(dict(row) for row in history["history"])
        _ = float(rows[-1]["total"])
        stop, settings, inputs = str(about["stop_reason"]), about["settings"], about["inputs"]
    except (KeyError, TypeError, ValueError, IndexError) as cause:
        raise SchemaError(
            f"{folder} lacks {cause} in {MANIFEST} or {HISTORY}; fit again"
        ) from cause
    levels = _levels(folder, n_levels, len(layers) * n_experts)
    return Collaboration(
        levels=levels,
        codes=read_codes(folder / CODES, len(levels[0].atoms)),
        history=rows,
        stop_reason=stop,
        layers=layers,
        n_experts=n_experts,
        settings=settings,
        activations=inputs.get("activations"),
    )


def _levels(folder: Path, n_levels: int, n_sites: int) -> tuple[Level, ...]:
    arrays, where = _read(folder / ATOMS), folder / ATOMS
    found: list[Level] = []
    for number in range(1, n_levels + 1):
        part = f"level{number}."
        atoms = _array(arrays, part + "atoms", np.float32, (None, n_sites), where)
        shape = (len(atoms),)
        usage = _array(arrays, part + "usage", np.float64, shape, where)
        peak = _array(arrays, part + "peak", np.float64, shape, where)
        links = None
        if found:
            links = _array(
                arrays, part + "links", np.float32, (len(found[-1].atoms), *shape), where
            )
        found.append(Level(atoms, usage, peak, links))
    if not found:
        raise SchemaError(f"{folder / MANIFEST} says there are no levels; fit again")
    return tuple(found)


def _read(path: Path) -> Arrays:
    try:
        return dict(load(path.read_bytes()))
    except (SafetensorError, OSError, ValueError) as cause:
        raise DataError(f"{path} is missing, truncated or damaged; fit again") from cause


def _array(
    arrays: Mapping[str, NDArray[Any]],
    name: str,
    dtype: type[np.generic],
    shape: tuple[int | None, ...],
    where: Path,
) -> NDArray[Any]:
    """A finite array of this type and shape (None: any length), read-only."""
    array = arrays.get(name)
    if array is None:
        raise SchemaError(f"{where} lacks {name}; fit again")
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        expected = f"{np.dtype(dtype).name}{shape}"
        raise SchemaError(
            f"{where} holds {name} as {array.dtype}{array.shape}, expected {expected}; fit again"
        )
    if not np.isfinite(array).all():
        raise DataError(f"{where} holds values of {name} that are not finite; fit again")
    array.flags.writeable = False
    return array
