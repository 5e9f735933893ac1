"""Finished shards as the folder of one recording."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from moecollab.manifest import MANIFEST, replace_folder, write_json
from moecollab.record.schema import (
    FOLDS,
    SAMPLE_COLUMNS,
    SAMPLES,
    TALLIES,
    TOKEN_COLUMNS,
    TOKENS,
    VOCABULARY,
    VOCABULARY_COLUMNS,
    layer_file,
    write_parts,
    write_table,
)
from moecollab.record.shards import ShardStore
from moecollab.record.tallies import Tallies
from moecollab.record.windows import Sample


def merge_shards(
    store: ShardStore,
    n_shards: int,
    samples: Sequence[Sample],
    tallies: Tallies,
    vocabulary: dict[int, str],
    folds: Tallies | None = None,
) -> None:
    """Turns finished shards into the recording's folder and puts it in its place."""
    folder = store.folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokens = _token_table(samples)
    write_table(tokens, folder / TOKENS)
    write_table(_sample_table(samples), folder / SAMPLES)
    words = {"token_id": list(vocabulary), "text": list(vocabulary.values())}
    write_table(pl.DataFrame(words, schema=VOCABULARY_COLUMNS), folder / VOCABULARY)
    for layer in store.manifest["model"]["layers"]:
        parts = _layer_parts(store, n_shards, layer, tokens)
        write_parts(parts, store.columns, folder / layer_file(layer))
    tallies.save(folder / TALLIES)
    if folds is not None:
        folds.save(folder / FOLDS)
    write_json(folder / MANIFEST, store.manifest | {"corpus": _corpus_facts(samples, tallies)})
    replace_folder(folder, store.target)
    store.close()


def _corpus_facts(samples: Sequence[Sample], tallies: Tallies) -> dict[str, Any]:
    n_tokens = sum(len(sample.ids) for sample in samples)
    return {"n_tokens": n_tokens, "n_samples": len(samples), "domains": list(tallies.domains)}


def _layer_parts(
    store: ShardStore, n_shards: int, layer: int, tokens: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """One layer's table, shard by shard."""
    start = 0
    for number in range(n_shards):
        found = store.read(number, layer)
        stop = start + len(found["expert"])
        places = tokens[start:stop].select("token", "sample", "position").to_dict()
        yield pl.DataFrame(places | found, schema=store.columns)
        start = stop


def _token_table(samples: Sequence[Sample]) -> pl.DataFrame:
    """One row per token, in corpus order."""
    lengths = np.array([len(sample.ids) for sample in samples])
    places = [
        np.arange(len(sample.ids)) if sample.positions is None else sample.positions
        for sample in samples
    ]
    columns = {
        "token": np.arange(int(lengths.sum())),
        "sample": np.repeat(np.arange(len(samples)), lengths),
        "position": np.concatenate(places),
        "token_id": np.concatenate([sample.ids for sample in samples]),
    }
    return pl.DataFrame(columns, schema=TOKEN_COLUMNS)


def _sample_table(samples: Sequence[Sample]) -> pl.DataFrame:
    columns = {
        "sample": range(len(samples)),
        "domain": [sample.document.domain for sample in samples],
        "n_tokens": [len(sample.ids) for sample in samples],
        "text_start": [sample.document.text.strip()[:80] for sample in samples],
    }
    return pl.DataFrame(columns, schema=SAMPLE_COLUMNS)
