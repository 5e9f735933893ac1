"""Next-token loss of each document of a corpus: what a plan costs, measured on your text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from moecollab.errors import DataError
from moecollab.models.context import context_of
from moecollab.progress import track

if TYPE_CHECKING:
    from moecollab.record.corpus import Corpus

SCHEMA = {"document": pl.String, "domain": pl.String, "tokens": pl.Int64, "nll": pl.Float64}


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; all but the first are predicted."""

    document: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class HeldOut:
    """Text to measure the loss on, tokenised and cut once for any number of models.

    Parameters
    ----------
    corpus : Corpus
        Documents with domains.
    windows : tuple of Window
        What is run: windows of the context's length that overlap by one, so that each token of a
        document but the first is predicted once.
    tokens : tuple of int
        Predicted tokens of each document; below 1 for one that predicts nothing.
    """

    corpus: Corpus
    windows: tuple[Window, ...]
    tokens: tuple[int, ...]

    @classmethod
    def read(cls, tokenizer: Any, corpus: Corpus, context: int) -> HeldOut:  # noqa: ANN401
        """Tokenises a corpus; special tokens are added once, at each document's start.

        Parameters
        ----------
        tokenizer : tokenizer
            The model's own.
        corpus : Corpus
            Documents with domains.
        context : int
            Tokens per window, at least 2.

        Raises
        ------
        DataError
            When no document has two tokens.
        """
        ids = [encode(tokenizer, document.text) for document in corpus.documents]
        windows = tuple(
            window for row, tokens in enumerate(ids) for window in cut(row, tokens, context)
        )
        if not windows:
            raise DataError("no document of the corpus has two tokens; give longer text")
        return cls(corpus, windows, tuple(len(tokens) - 1 for tokens in ids))

    @property
    def skipped(self) -> int:
        """Documents of fewer than two tokens, which have no row."""
        return sum(size < 1 for size in self.tokens)


def document_losses(
    model: Any,  # noqa: ANN401 (any causal language model)
    text: HeldOut,
    *,
    batch_size: int,
) -> pl.DataFrame:
    """Loss of every document; logits are taken to float32 and losses added in float64.

    Parameters
    ----------
    model : causal language model
        Left as it was, hooks and training mode included.
    text : HeldOut
        Text in the model's own tokens.
    batch_size : int
        Windows per forward pass, at least 1. It may change the model's own rounding only.

    Returns
    -------
    DataFrame
        Columns document, domain, tokens (predicted ones) and nll (their loss in nats, summed), in
        the order of the corpus; documents that predict nothing have no row.

    Raises
    ------
    DataError
        When a loss is not finite.
    """
    nll = _window_losses(model, text.windows, batch_size)
    total = np.zeros(len(text.tokens), dtype=np.float64)
    np.add.at(total, [window.document for window in text.windows], nll)
    return _table(text, total)


def encode(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 (any tokenizer)
    """Token ids of a text with the tokenizer's own special tokens."""
    return [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]


def cut(document: int, ids: Sequence[int], context: int) -> Iterator[Window]:
    """Windows of at most `context` tokens that overlap by one.

    Examples
    --------
    >>> [window.ids for window in cut(0, [1, 2, 3, 4, 5, 6], context=3)]
    [(1, 2, 3), (3, 4, 5), (5, 6)]
    """
    for start in range(0, len(ids) - 1, context - 1):
        yield Window(document, tuple(ids[start : start + context]))


def window_of(config: Any, context: int) -> int:  # noqa: ANN401 (any model config)
    """Tokens per window: as asked, or as many positions as the model has if these are fewer."""
    return context_of(getattr(config, "text_config", None) or config, context)


def _window_losses(
    model: Any,  # noqa: ANN401 (any causal language model)
    windows: Sequence[Window],
    batch_size: int,
) -> NDArray[np.float64]:
    """Loss in nats of each window: float64 array of shape (n_windows,)."""
    order = sorted(range(len(windows)), key=lambda row: -len(windows[row].ids))  # stable
    losses = np.zeros(len(windows), dtype=np.float64)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), track("measuring loss", len(windows)) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                losses[rows] = _batch_losses(model, [windows[row].ids for row in rows])
                bar.advance(len(rows))
    finally:
        model.train(training)
    return losses


def _batch_losses(model: Any, batch: list[tuple[int, ...]]) -> list[float]:  # noqa: ANN401
    """Loss in nats of each sequence of a batch, padded on the right and masked."""
    longest = max(len(ids) for ids in batch)
    tokens = torch.zeros((len(batch), longest), dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, ids in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
    tokens, attention = tokens.to(model.device), attention.to(model.device)
    logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
    return [
        _sequence_loss(logits[row, : len(ids) - 1], tokens[row, 1 : len(ids)])
        for row, ids in enumerate(batch)
    ]


def _sequence_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed loss in nats; one sequence at a time so that float32 logits stay small."""
    targets = targets.to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return float(losses.double().sum())


def _table(text: HeldOut, nll: NDArray[np.float64]) -> pl.DataFrame:
    """The documents' table."""
    documents = text.corpus.documents
    for document, loss in zip(documents, nll, strict=True):
        if not np.isfinite(loss):
            raise DataError(
                f"the loss on document {document.id!r} is {loss}; look for NaN in the model's "
                "weights or load it as float32"
            )
    whole = pl.DataFrame(
        {
            "document": [document.id for document in documents],
            "domain": [document.domain for document in documents],
            "tokens": text.tokens,
            "nll": nll,
        },
        schema=SCHEMA,
    )
    return whole.filter(pl.col("tokens") > 0)
