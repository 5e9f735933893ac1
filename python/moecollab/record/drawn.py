"""Documents of a recording drawn with replacement: the recording that they would have made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.manifest import digest_bytes
from moecollab.record.activations import Activations, Grain, LayerTable, Span, Weights
from moecollab.record.folds import SINGLE, tallies_by
from moecollab.record.rows import Rows
from moecollab.record.schema import SAMPLES, VOCABULARY
from moecollab.record.tallies import Tallies

Thing = TypeVar("Thing")
Scalar = TypeVar("Scalar", bound=np.generic)


class Documents:
    """The documents of a recording, any of which can be drawn any number of times.

    What draws read of the recording is read once and stays in memory.

    Parameters
    ----------
    acts : Activations
        The recording.
    """

    def __init__(self, acts: Activations) -> None:
        self.acts = acts
        sample = acts.tokens()["sample"].to_numpy().astype(np.int64)
        self._by_document = np.argsort(sample, kind="stable")
        self._length = np.bincount(sample, minlength=acts.n_samples)
        self._held: dict[object, Any] = {}

    def drawn(self, times: NDArray[np.int64]) -> Drawn:
        """The recording of every document as often as told, one after the other.

        Parameters
        ----------
        times : int64 array of shape (n_samples,)
            How often each document was drawn, ≥ 0.
        """
        document = np.repeat(np.arange(len(times)), times)
        length = self._length[document]
        start = (np.cumsum(self._length) - self._length)[document]
        first = np.cumsum(length) - length
        place = np.repeat(start - first, length) + np.arange(int(length.sum()))
        about = self.acts.manifest
        corpus = {"n_tokens": len(place), "n_samples": len(document)}
        return Drawn(
            self.acts.path,
            about | {"corpus": about["corpus"] | corpus},
            source=self,
            document=document,
            token=self._by_document[place],
            sample=np.repeat(np.arange(len(document)), length),
        )

    def hold(self, name: object, read: Callable[[], Thing]) -> Thing:
        """What `read` gave when it was asked for first."""
        if name not in self._held:
            self._held[name] = read()
        found: Thing = self._held[name]
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class _Places:
    """Where documents that were drawn come from."""

    source: Documents
    document: NDArray[np.int64] = field(repr=False)
    token: NDArray[np.int64] = field(repr=False)
    sample: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class Drawn(Activations, _Places):
    """A recording in memory of documents of another, some of them repeated, some left out.

    It reads as the recording of that text would: a document that was drawn twice is two samples.

    Parameters
    ----------
    source : Documents
        What was drawn from.
    document : int64 array of shape (n_samples,)
        The document that each sample is.
    token : int64 array of shape (n_tokens,)
        The token of the source that each token is.
    sample : int64 array of shape (n_tokens,)
        The sample of each token.
    """

    def layer(self, layer: int, span: Span | None = None) -> LayerTable:
        """What one MoE layer did, for all tokens or those of a span (start, stop)."""
        held = self.source.hold(layer, lambda: self.source.acts.layer(layer))
        token = self._tokens_of(span)
        return LayerTable(
            _frozen(held.expert[token]),
            _frozen(held.weight[token]),
            None if held.norm is None else _frozen(held.norm[token]),
            None if held.next is None else _frozen(held.next[token]),
        )

    def tallies(self) -> Tallies:
        """Sums by domain, layer and expert; of those alone that single tokens tell."""
        place = {name: number for number, name in enumerate(self.domains)}
        part = np.array([place[name] for name in self.samples()["domain"]], np.int64)
        groups = [group for group in self.groups if group in SINGLE]
        return Tallies(self.domains, tallies_by(self, part, len(place), groups).arrays)

    def fold_tallies(self, *, by_domain: bool = False) -> None:
        """None: documents that were drawn have no folds."""

    def digest(self) -> str:
        """Digest of the source and of the documents drawn."""
        drawn = digest_bytes(self.document.tobytes())
        return digest_bytes(f"{self.source.acts.digest()}{drawn}".encode())

    def _tokens_of(self, span: Span | None) -> NDArray[np.int64]:
        return self.token if span is None else self.token[span[0] : span[1]]

    def _table(
        self, name: str, columns: list[str] | None = None, span: Span | None = None
    ) -> pl.DataFrame:
        held = self.source.hold(name, lambda: self.source.acts._table(name))
        if name == SAMPLES:
            numbers = pl.Series("sample", np.arange(len(self.document)), pl.UInt32)
            held = held[self.document].with_columns(numbers)
        elif name != VOCABULARY:
            held = held[self.token].with_columns(
                pl.Series("token", np.arange(len(self.token)), held.schema["token"]),
                pl.Series("sample", self.sample, held.schema["sample"]),
            )
        if span is not None:
            held = held[span[0] : span[1]]
        return held if columns is None else held.select(columns)

    def _scan(self, name: str) -> pl.LazyFrame:
        return self._table(name).lazy()

    def _token_rows(self, weights: Weights, span: Span | None = None) -> Rows:
        held = self.source.hold(("token", weights), lambda: self.source.acts.rows("token", weights))
        sample = self.sample if span is None else self.sample[span[0] : span[1]]
        return _of_samples(held.take(self._tokens_of(span)), sample)

    def _sample_rows(self, weights: Weights, *, mean: bool) -> Rows:
        grain: Grain = "sample" if mean else "sample_sum"
        held = self.source.hold((grain, weights), lambda: self.source.acts.rows(grain, weights))
        return _of_samples(held.take(self.document), np.arange(len(self.document)))


def _frozen(array: NDArray[Scalar]) -> NDArray[Scalar]:
    array.flags.writeable = False
    return array


def _of_samples(rows: Rows, sample: NDArray[np.int64]) -> Rows:
    """The rows under other numbers of samples."""
    return Rows(rows.indptr, rows.sites, rows.values, sample.astype(np.uint32), rows.n_sites)
