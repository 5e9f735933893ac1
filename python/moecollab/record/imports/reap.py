"""Observations of REAP (``.pt``): sums per layer and expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moecollab.errors import SchemaError
from moecollab.record.corpus import DEFAULT_DOMAIN
from moecollab.record.imports.counting import Part, add_up, numbers
from moecollab.record.imports.dump import CountDump, Options
from moecollab.record.imports.tensors import as_array, load_tensors

REAP_SUMS = {
    "expert_frequency": "count",
    "weighted_expert_frequency_sum": "sum_weight",
    "ean_sum": "sum_norm",
    "weighted_ean_sum": "sum_weighted_norm",
}


def read_reap(paths: Sequence[Path], options: Options) -> CountDump:
    """Dictionaries by layer with ``expert_frequency`` and what was summed beside it.

    Means, maxima (of signed values) and pairwise numbers (sums of two marginals) are not read: the
    sums say all that they do. Files are shards and add up.
    """
    return add_up([_part(path, load_tensors(path)) for path in paths], options)


def _part(path: Path, file: Any) -> Part:  # noqa: ANN401 (whatever the file holds)
    if not isinstance(file, dict) or not file:
        raise SchemaError(f"{path} is no dictionary by layer; give observations of REAP")
    sums, tokens = {}, set()
    for layer, found in file.items():
        where = f"{path} layer {layer}"
        if not isinstance(layer, int) or not isinstance(found, Mapping):
            raise SchemaError(f"{where} is no layer with its sums; give observations of REAP")
        if "expert_frequency" not in found:
            raise SchemaError(f"{where} lacks expert_frequency; give observations of REAP")
        sums[layer] = {
            ours: numbers(as_array(found[theirs], f"{where} {theirs}"), f"{where} {theirs}")
            for theirs, ours in REAP_SUMS.items()
            if theirs in found
        }
        total = as_array(found.get("total_tokens", -1), f"{where} total_tokens")
        tokens.add(int(np.asarray(total).reshape(-1)[0]) if total.size == 1 else -1)
    n_tokens = tokens.pop() if len(tokens) == 1 else -1
    return Part(
        where=str(path),
        domain=DEFAULT_DOMAIN,
        sums=sums,
        n_tokens=n_tokens if n_tokens > 0 else None,
    )
