"""Experts that are named layer by layer, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import read_json
from moecollab.models.widths import counts_from_json

if TYPE_CHECKING:  # prune reads plans, and needs neither criteria nor Polars for them
    from moecollab.criteria.scores import Scores

Sites: TypeAlias = Mapping[int, Iterable[int]]
Named: TypeAlias = "Sites | str | PathLike[str] | None"


def read_sites(
    name: Literal["keep", "drop_list"], given: Named, scores: Scores
) -> dict[int, tuple[int, ...]]:
    """The named experts, sorted, each of them in the model.

    Raises
    ------
    SettingsError
        When a layer or an expert is not in the model, or what is given is not such a mapping.
    DataError
        When a file is not of such a mapping nor a plan.
    """
    found = {}
    for layer, ids in _opened(name, given).items():
        if layer not in scores.layers:
            raise SettingsError(name, {layer: ids}, f"of the MoE layers {scores.layers}")
        count = scores.counts_of_experts[scores.layers.index(layer)]
        if ids and not 0 <= ids[0] <= ids[-1] < count:
            raise SettingsError(name, {layer: ids}, f"of expert ids in [0, {count})")
        if ids:
            found[layer] = ids
    return found


def sorted_sites(name: Literal["keep", "drop_list"], given: Named) -> dict[int, list[int]]:
    """The named experts as plain data, read once; they are in no model yet.

    Raises
    ------
    SettingsError
        When what is given is not such a mapping.
    DataError
        When a file is not of such a mapping nor a plan.
    """
    return {layer: list(ids) for layer, ids in _opened(name, given).items()}


def _opened(name: str, given: Named) -> dict[int, tuple[int, ...]]:
    """The mapping itself, or that in a file; layers and ids ascending."""
    if isinstance(given, str | PathLike):
        found = _read(name, Path(given))
    else:
        try:
            found = with_number_keys(given or {})
        except (TypeError, AttributeError, ValueError) as cause:
            allowed = "a path, or lists of expert ids by layer, as {3: [0, 7]} is"
            raise SettingsError(name, given, allowed) from cause
    return {layer: tuple(sorted(set(ids))) for layer, ids in found.items()}


def _read(name: str, path: Path) -> dict[int, tuple[int, ...]]:
    """The mapping in a file."""
    found = read_json(path)
    try:
        if found.get("kind") == "super_experts" and name == "keep":
            return with_number_keys(found["keep"])
        if found.get("kind") != "plan":
            return with_number_keys(found)
        kept = with_number_keys(found["keep"])
        if name == "keep":
            return kept
        counts = counts_from_json(found.get("experts_per_layer"), len(kept))
        held = counts or (int(found["n_experts"]),) * len(kept)
        layers = zip(kept.items(), held, strict=True)
        return {layer: tuple(set(range(n)) - set(ids)) for (layer, ids), n in layers}
    except (LookupError, TypeError, AttributeError, ValueError) as cause:
        raise DataError(
            f'{path} is neither a plan nor of experts by layer, as {{"3": [0, 7]}} is; write it so'
        ) from cause


def kept_ids(kept: NDArray[np.bool_], layers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Ids of the experts that stay, by layer; `kept` has shape (n_layers, n_experts)."""
    return {
        layer: tuple(np.flatnonzero(row).tolist()) for layer, row in zip(layers, kept, strict=True)
    }


def site_mask(sites: Sites, layers: tuple[int, ...], n_experts: int) -> NDArray[np.bool_]:
    """Which sites are named: bool array of shape (n_layers, n_experts)."""
    mask = np.zeros((len(layers), n_experts), dtype=np.bool_)
    for layer, held in sites.items():
        mask[layers.index(layer), list(held)] = True
    return mask


def with_text_keys(sites: Sites) -> dict[str, list[int]]:
    """The same as JSON has it."""
    return {str(layer): list(experts) for layer, experts in sites.items()}


def with_number_keys(sites: Mapping[Any, Iterable[Any]]) -> dict[int, tuple[int, ...]]:
    """Named experts, by layer, text as in JSON or not; raises what int() and index() raise."""
    ids = {
        int(layer) if isinstance(layer, str) else index(layer): tuple(map(index, kept))
        for layer, kept in sites.items()
    }
    return dict(sorted(ids.items()))
