"""Checked foreign routing as an ordinary folder of activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moecollab.manifest import manifest
from moecollab.progress import track
from moecollab.record.activations import Activations, load_activations
from moecollab.record.corpus import Document
from moecollab.record.imports.checking import Checked
from moecollab.record.merging import merge_shards
from moecollab.record.recorder import Routing
from moecollab.record.schema import KIND, VERSION
from moecollab.record.shards import Arrays, ShardStore
from moecollab.record.tallies import Tallies
from moecollab.record.tallying import Tokens, tally
from moecollab.record.windows import Sample, group_shards

NOT_RECORDED = "<not recorded>"
"""Text of the only token id of a recording whose tokens are not known."""


def write_activations(
    checked: Checked, target: Path, *, source: str, digest: str, settings: dict[str, Any]
) -> Activations:
    """Writes a folder of activations through the writers that ``extract`` uses.

    Parameters
    ----------
    checked : Checked
        The routing.
    target : Path
        Where the folder goes; what is there is replaced.
    source : str
        Kind of the files.
    digest : str
        Digest of the files.
    settings : dict
        What the user said about them.
    """
    about = _manifest(checked, source, digest, settings)
    # Nothing is lost by starting an import over.
    with ShardStore(target, about, overwrite=True) as store:
        _write(checked, store)
    return load_activations(target)


def _write(checked: Checked, store: ShardStore) -> None:
    """Writes the columns of all tokens, their sums and what belongs to them."""
    samples, named = _samples(checked)
    domains = sorted({sample.document.domain for sample in samples})
    lengths = [len(sample.ids) for sample in samples]
    first = np.cumsum([0, *lengths])
    shards = group_shards(samples)
    total = Tallies.zeros(domains, len(checked.layers), checked.n_experts, groups=("routing",))
    with track("import", int(first[-1])) as bar:
        for number, shard in enumerate(shards):
            span = slice(int(first[shard.start]), int(first[shard.stop]))
            routing = _write_shard(checked, store, number, span)
            tokens = Tokens.of([samples[index] for index in shard], domains)
            tally(domains, tokens, routing, checked.n_experts, ("routing",), total)
            bar.advance(span.stop - span.start)
    merge_shards(store, len(shards), samples, total, _vocabulary(samples, named=named))


def _manifest(
    checked: Checked, source: str, digest: str, settings: dict[str, Any]
) -> dict[str, Any]:
    described = manifest(
        KIND, VERSION, settings={"norms": False} | settings, inputs={"files": digest}
    )
    described["model"] = {
        "class": f"imported from {source}",
        "model_type": source,
        "layers": list(checked.layers),
        "n_experts": checked.n_experts,
        "top_k": checked.expert.shape[2],
        "path": "",
        "weights": checked.has_weights,
    }
    described["imported"] = {"kind": source, "findings": checked.findings.counted()}
    return described


def _samples(checked: Checked) -> tuple[list[Sample], bool]:
    """Samples with at least one token, in order, and whether their token ids are known."""
    pieces = checked.pieces
    named = all(piece.token_ids is not None for piece in pieces)
    samples = []
    for number in np.unique(checked.piece):
        piece, rows = pieces[number], checked.row[checked.piece == number]
        ids = piece.token_ids if named and piece.token_ids is not None else None
        places = rows if piece.positions is None else piece.positions[rows]
        samples.append(
            Sample(
                Document("", piece.domain, piece.where),
                np.zeros(len(rows), np.uint32) if ids is None else ids[rows],
                places.astype(np.uint32),
            )
        )
    return samples, named


def _write_shard(checked: Checked, store: ShardStore, number: int, span: slice) -> list[Routing]:
    """Writes the columns of one shard's tokens and returns them, layer by layer."""
    routing = []
    arrays: Arrays = {}
    for row, layer in enumerate(checked.layers):
        expert = np.ascontiguousarray(checked.expert[span, row])
        weight = np.ascontiguousarray(checked.weight[span, row])
        routing.append(Routing(expert, weight))
        arrays |= {f"expert.{layer}": expert, f"weight.{layer}": weight}
    store.write(number, arrays)
    return routing


def _vocabulary(samples: Sequence[Sample], *, named: bool) -> dict[int, str]:
    """Every token id that occurs; the files hold no texts of tokens."""
    if not named:
        return {0: NOT_RECORDED}
    occurring = np.unique(np.concatenate([sample.ids for sample in samples]))
    return {int(number): f"<{number}>" for number in occurring}
