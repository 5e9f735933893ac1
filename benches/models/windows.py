"""Windows of tokens from documents by domain, the same number from each domain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.demo.training_text import TrainingText
from moecollab.errors import DataError

_PIECE = 3_000  # characters taken from a document in a round, so that books do not fill a domain
_CALIBRATION = 0.1  # share of each domain's documents, at least one


def split(text: TrainingText) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents for calibration and others for tuning, by domain; none of them is held out.

    `read_training_text` orders documents by a digest of their text, so the split depends on
    nothing else.
    """
    calibration, tuning = {}, {}
    for domain, documents in text.train.items():
        first = max(1, round(len(documents) * _CALIBRATION))
        calibration[domain], tuning[domain] = documents[:first], documents[first:]
    return calibration, tuning


def windows(
    documents: Mapping[str, list[str]], tokenizer: Any, total: int, length: int, seed: int
) -> NDArray[np.int64]:
    """At least `total` windows of token ids in random order, (n_windows, length)."""
    per_domain = -(-total // len(documents))
    rows = [
        _stream(_pieces(texts), tokenizer, per_domain * length).reshape(per_domain, length)
        for texts in documents.values()
    ]
    return np.random.default_rng(seed).permutation(np.concatenate(rows))


def _pieces(documents: list[str]) -> Iterator[str]:
    """The first characters of every document, then the next ones, and so on."""
    for start in count(0, _PIECE):
        left = [text[start : start + _PIECE] for text in documents if len(text) > start]
        if not left:
            return
        yield from left


def _stream(pieces: Iterable[str], tokenizer: Any, size: int) -> NDArray[np.int64]:
    """The first `size` token ids of the pieces, each ended by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids: list[int] = []
    for piece in pieces:
        ids += [*tokenizer(piece, add_special_tokens=False).input_ids, end]
        if len(ids) >= size:
            return np.array(ids[:size], dtype=np.int64)
    raise DataError(
        f"a domain has {len(ids)} tokens where {size} are asked for; ask for fewer windows"
    )
