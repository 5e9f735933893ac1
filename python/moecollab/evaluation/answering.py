"""How a model answers lm-eval: short requests together, one bar, no chatter of other packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.std import tqdm

from moecollab.progress import track

TOKENS_PER_ROW = 256
"""Tokens that a batch holds for each row of `batch_size`: more rows if they are shorter."""
REMEMBERED = 16_384
"""Texts whose tokens are remembered from one cut of the model to the next."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as lm-eval has them, and the tokens of each."""


class Respondent(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's own adapter of transformers' models, for causal ones with batches by tokens.

    Answers are those of :class:`HFLM` but for the model's own rounding: the same tokens, cut from
    the left if there are too many, and the same sums of log-probabilities.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:  # noqa: ANN401
        with hushed():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._remembered = lru_cache(REMEMBERED)(self._encode)

    def _encode(self, string: str, special: bool | None) -> tuple[int, ...]:
        return tuple(super().tok_encode(string, add_special_tokens=special))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: object,
    ) -> list[int]:
        """Tokens of a text, remembered since every cut of a model is asked the same."""
        found = list(self._remembered(string, add_special_tokens))
        return found[-left_truncate_len:] if left_truncate_len else found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would say."""
        if self.backend != "causal":
            plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return plain
        rows: dict[tuple[int, ...], list[int]] = {}
        for at, (_text, context, continuation) in enumerate(requests):
            # Continuations that differ in the last token alone share what the model reads.
            ids = tuple((context + continuation)[-(self.max_length + 1) : -1])
            rows.setdefault(ids, []).append(at)
        found: dict[int, tuple[float, bool]] = {}
        with track("answering questions", len(requests)) as bar:
            for batch in batches(sorted(rows, key=_longest_first), self.batch_size):
                for ids, logits in zip(batch, self._logits(batch), strict=True):
                    for at in rows[ids]:
                        found[at] = self._answer(logits[: len(ids)], requests[at][2])
                    bar.advance(len(rows[ids]))
        return [found[at] for at in range(len(requests))]

    def _logits(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Logits of some rows, padded on the right: (n_rows, longest, n_vocabulary)."""
        padded = torch.zeros((len(batch), len(batch[0])), dtype=torch.long)
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = torch.tensor(ids)
        logits: torch.Tensor = self._model_call(padded.to(self.device))
        return logits

    def _answer(self, logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """The answer to one request, from the logits of all that was read."""
        own = logits[-len(continuation) :].log_softmax(-1, dtype=self.softmax_dtype)
        chosen = torch.tensor(continuation, device=own.device)
        total = own.gather(1, chosen[:, None]).sum()
        return float(total), bool((own.argmax(-1) == chosen).all())


def _longest_first(ids: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return -len(ids), ids


def batches(
    rows: Sequence[tuple[int, ...]], batch_size: int
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Rows in batches of at least `batch_size`, and of more if the first of a batch is short.

    Parameters
    ----------
    rows : sequence of tuple of int
        Token ids, the longest first.
    batch_size : int
        Rows of 256 tokens that fit a batch, at least 1.

    Examples
    --------
    >>> [len(batch) for batch in batches([(0,) * 300] * 3 + [(0,) * 100] * 6, 2)]
    [2, 2, 5]
    """
    start = 0
    while start < len(rows):
        size = max(batch_size, batch_size * TOKENS_PER_ROW // len(rows[start]))
        yield rows[start : start + size]
        start += size


@contextmanager
def hushed() -> Iterator[None]:
    """Hides the bars and warnings of lm-eval and datasets, which come again with every model."""
    logger, plain = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level

    def hidden(self: Any, *given: Any, **options: Any) -> None:  # noqa: ANN401 (tqdm's own)
        plain(self, *given, **options | {"disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = plain
        logger.setLevel(level)
