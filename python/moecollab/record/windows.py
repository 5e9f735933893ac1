"""From documents to the windows of tokens that a model reads at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError
from moecollab.record.corpus import Corpus, Document

Tokenize = Callable[[str], NDArray[np.uint32]]
SHARD_TOKENS = 8_192  # what a killed run may lose; larger shards only save a few files


@dataclass(frozen=True)
class Sample:
    """A document as tokens, perhaps cut short by a limit.

    Parameters
    ----------
    document : Document
        Where the tokens come from.
    ids : uint32 array of shape (n_tokens,)
        Token ids, at least one.
    positions : uint32 array of shape (n_tokens,), or None
        Positions in the document; 0, 1, 2 … if None.
    """

    document: Document
    ids: NDArray[np.uint32]
    positions: NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class Window:
    """A run of tokens of one sample that the model reads from an empty context.

    Parameters
    ----------
    sample : int
        Number of the sample within its shard.
    start : int
        Position in the sample of the window's first token; positions go on over windows.
    ids : uint32 array of shape (n_tokens,)
        At most as many as the context.
    """

    sample: int
    start: int
    ids: NDArray[np.uint32]


def select_samples(
    corpus: Corpus, tokenize: Tokenize, *, limit: int | None, seed: int
) -> list[Sample]:
    """Samples of a corpus in its order; with a limit, a seeded choice from every domain.

    Each domain gets a share of the limit in proportion to its text, filled with whole documents in
    random order; the last one is cut to fit. What a domain cannot fill goes to the others.

    Parameters
    ----------
    corpus : Corpus
        The documents.
    tokenize : callable
        Token ids of a text, uint32.
    limit : int or None
        Most tokens to return.
    seed : int
        Seed of the choice.
    """
    if limit is None:
        tokens = [tokenize(document.text) for document in corpus.documents]
    else:
        tokens = _limited(corpus, tokenize, limit, seed)
    samples = [
        Sample(document, ids)
        for document, ids in zip(corpus.documents, tokens, strict=True)
        if len(ids)
    ]
    if not samples:
        raise DataError("the tokenizer makes no tokens of the corpus; give it other text")
    return samples


def _limited(corpus: Corpus, tokenize: Tokenize, limit: int, seed: int) -> list[NDArray[np.uint32]]:
    """Chosen tokens of every document; most have none."""
    order = np.random.default_rng(seed).permutation(len(corpus)).tolist()
    domains = [
        _Domain([corpus.documents[i].text for i in order if corpus.documents[i].domain == name])
        for name in corpus.domains
    ]
    left = limit
    while left and any(domain.waiting for domain in domains):
        unfilled = [domain for domain in domains if domain.waiting]
        shares = _shares([domain.size for domain in unfilled], left)
        left -= sum(
            domain.take(share, tokenize) for domain, share in zip(unfilled, shares, strict=True)
        )
    found = {name: iter(domain.taken) for name, domain in zip(corpus.domains, domains, strict=True)}
    chosen = [np.empty(0, np.uint32)] * len(corpus)
    for index in order:
        chosen[index] = next(found[corpus.documents[index].domain], chosen[index])
    return chosen


class _Domain:
    """Texts of one domain in the order in which they are taken, and what was taken of them."""

    def __init__(self, texts: list[str]) -> None:
        self.size = sum(len(text) for text in texts)
        self.texts = iter(texts)
        self.taken: list[NDArray[np.uint32]] = []
        self.rest = np.empty(0, np.uint32)
        self.waiting = True

    def take(self, share: int, tokenize: Tokenize) -> int:
        """Takes up to `share` tokens more and returns how many there were."""
        left = share
        while left and self.waiting:
            if not len(self.rest):
                self._open(tokenize)
                continue
            piece, self.rest = self.rest[:left], self.rest[left:]
            self.taken[-1] = np.concatenate([self.taken[-1], piece])
            left -= len(piece)
        return share - left

    def _open(self, tokenize: Tokenize) -> None:
        """Goes on to the next text."""
        text = next(self.texts, None)
        if text is None:
            self.waiting = False
            return
        self.rest = tokenize(text)
        self.taken.append(self.rest[:0])


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to the sizes that add up to the total; large remainders first."""
    exact = np.asarray(sizes, dtype=np.float64) * (total / sum(sizes))
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def cut_windows(samples: Sequence[Sample], context: int) -> list[Window]:
    """All tokens of some samples in consecutive windows; none is lost and none read twice."""
    return [
        Window(number, start, sample.ids[start : start + context])
        for number, sample in enumerate(samples)
        for start in range(0, len(sample.ids), context)
    ]


def group_shards(samples: Sequence[Sample], size: int = SHARD_TOKENS) -> list[range]:
    """Runs of whole samples with about `size` tokens each; depends on the samples alone."""
    shards, first, total = [], 0, 0
    for number, sample in enumerate(samples):
        total += len(sample.ids)
        if total >= size:
            shards.append(range(first, number + 1))
            first, total = number + 1, 0
    if first < len(samples):
        shards.append(range(first, len(samples)))
    return shards


def group_batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Numbers of windows that are run together: of like length, the longest first."""
    order = sorted(range(len(windows)), key=lambda number: (-len(windows[number].ids), number))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
