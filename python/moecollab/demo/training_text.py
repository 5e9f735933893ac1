"""Text that the embedded model learns from: domains, a held-out split, facts, token streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moecollab.errors import DataError
from moecollab.progress import track

END = "<|endoftext|>"
FACTS = "facts"
_HELD_OUT = 0.04  # share of each domain's documents, at least one
_TOKENIZER_CHARS = 1_200_000  # per domain, so that every domain shapes the vocabulary alike


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Documents by domain, split into those to learn from and those held out."""

    train: dict[str, list[str]]
    """Documents to learn from, by domain."""
    held_out: dict[str, list[str]]
    """Documents never learnt from, by domain."""
    facts: pl.DataFrame
    """Relation facts: relation, subject, prompt, object."""


def read_training_text(folder: Path) -> TrainingText:
    """The corpus and facts of a data folder (`corpus/<domain>.parquet`, `facts/facts.parquet`)."""
    paths = sorted((folder / "corpus").glob("*.parquet"))
    if not paths:
        raise DataError(f"{folder} has no corpus/*.parquet; pass the folder that holds the corpus")
    train, held_out = {}, {}
    for path in paths:
        texts = pl.read_parquet(path, columns=["text"])["text"].to_list()
        texts = sorted((t for t in texts if t.strip()), key=_digest)
        kept_back = max(1, round(len(texts) * _HELD_OUT))
        held_out[path.stem], train[path.stem] = texts[:kept_back], texts[kept_back:]
    return TrainingText(
        train=train, held_out=held_out, facts=pl.read_parquet(folder / "facts" / "facts.parquet")
    )


def _digest(text: str) -> bytes:
    """A stable pseudo-random key, so that the split depends on the text alone."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def learn_tokenizer(text: TrainingText, size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` pieces, every domain weighing alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_sample(text), trainer)
    return tokenizer


def _tokenizer_sample(text: TrainingText) -> Iterator[str]:
    """The first documents of each domain up to a fixed amount, then every fact."""
    for documents in text.train.values():
        left = _TOKENIZER_CHARS
        for document in documents:
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break
    yield from statements(text.facts)


def statements(facts: pl.DataFrame) -> list[str]:
    """Each fact as one sentence."""
    return [f"{prompt} {obj}." for prompt, obj in facts.select("prompt", "object").iter_rows()]


def encode_streams(text: TrainingText, tokenizer: Tokenizer) -> dict[str, NDArray[np.uint16]]:
    """Token ids of each domain's training documents in one row, documents ended by END."""
    end = np.array([_end_id(tokenizer)], dtype=np.uint16)
    streams = {}
    with track("encode the corpus", total=len(text.train)) as bar:
        for domain, documents in text.train.items():
            pieces = []
            for first in range(0, len(documents), 64):
                for encoding in tokenizer.encode_batch_fast(documents[first : first + 64]):
                    pieces += [np.array(encoding.ids, dtype=np.uint16), end]
            streams[domain] = np.concatenate(pieces)
            bar.advance()
    return streams


def _end_id(tokenizer: Tokenizer) -> int:
    """Id of the piece that ends a document; it is the first of the vocabulary."""
    return int(tokenizer.encode(END).ids[0])


@dataclass(frozen=True)
class FactSampler:
    """Draws fact sentences: a relation first (by the root of its size), then one of its facts."""

    encoded: list[list[list[int]]]
    weights: NDArray[np.float64]
    end: int

    @classmethod
    def build(cls, facts: pl.DataFrame, tokenizer: Tokenizer) -> FactSampler:
        """Facts encoded and grouped by relation."""
        groups = [
            [encoding.ids for encoding in tokenizer.encode_batch_fast(statements(group))]
            for group in facts.partition_by("relation", maintain_order=True)
        ]
        weights = np.sqrt([len(group) for group in groups])
        return cls(groups, weights / weights.sum(), _end_id(tokenizer))

    def window(self, rng: np.random.Generator, length: int) -> NDArray[np.int64]:
        """`length` token ids of fact sentences, each ended by END."""
        ids: list[int] = []
        while len(ids) < length:
            group = self.encoded[rng.choice(len(self.encoded), p=self.weights)]
            ids += [*group[rng.integers(len(group))], self.end]
        return np.array(ids[:length], dtype=np.int64)


@dataclass(frozen=True)
class Batches:
    """Training batches that depend on seed and step alone, so a resumed run sees the same."""

    streams: dict[str, NDArray[np.uint16]]
    facts: FactSampler
    fact_share: float
    seed: int

    def batch(self, step: int, rows: int, length: int) -> NDArray[np.int64]:
        """Token ids (rows, length): random windows, domains drawn by the root of their size."""
        rng = np.random.default_rng((self.seed, step))
        sizes = np.sqrt([len(stream) for stream in self.streams.values()])
        domains = list(self.streams)
        out = np.empty((rows, length), dtype=np.int64)
        for row in range(rows):
            if rng.random() < self.fact_share:
                out[row] = self.facts.window(rng, length)
                continue
            stream = self.streams[domains[rng.choice(len(domains), p=sizes / sizes.sum())]]
            first = rng.integers(len(stream) - length)
            out[row] = stream[first : first + length]
        return out
