"""How a model answers lm-eval: short requests together, one bar, no chatter of other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.std import tqdm

from moecollab.evaluation.generation import check_tokens, greedy_settings
from moecollab.progress import track

TOKENS_PER_ROW = 256
"""Tokens that a batch holds for each row of `batch_size`: more rows if they are shorter."""
REMEMBERED = 16_384
"""Texts whose tokens are remembered from one cut of the model to the next."""

Answer = Callable[[list[Any], bool], list[Any]]
"""What answers requests, with or without a bar."""
Keep = Callable[[str, Callable[[], Any]], Any]
"""What gives the answers of that name as they were kept, or else has them made."""
Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as lm-eval has them, and the tokens of each."""


class Respondent(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's own adapter of transformers' models, for causal ones with batches by tokens.

    Answers are those of :class:`HFLM` but for the model's own rounding: the same tokens, cut from
    the left if there are too many, and the same sums of log-probabilities.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 (any causal language model)
        tokenizer: Any,  # noqa: ANN401 (any tokenizer)
        batch_size: int,
        keep: Keep | None = None,
    ) -> None:
        with hushed():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._remembered = lru_cache(REMEMBERED)(self._encode)
        self._keep = keep

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would say."""
        found = self._by_task("loglikelihood", super().loglikelihood, requests, disable_tqdm)
        return [(total, right) for total, right in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text."""
        return self._by_task("rolling", super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text."""
        return self._by_task("generate", super().generate_until, requests, disable_tqdm)

    def _by_task(
        self, kind: str, answer: Answer, requests: list[Any], disable_tqdm: bool
    ) -> list[Any]:
        """Answers to all requests, task by task where they are kept for a run that is stopped."""
        if self._keep is None:
            return answer(requests, disable_tqdm)
        found: list[Any] = [None] * len(requests)
        tasks: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            tasks.setdefault(str(request.task_name), []).append(at)
        for name, places in tasks.items():
            own = [requests[at] for at in places]
            kept = self._keep(f"{kind} {name}", partial(answer, own, disable_tqdm))
            for at, one in zip(places, kept, strict=True):
                found[at] = one
        return found

    def _encode(self, string: str, special: bool | None) -> tuple[int, ...]:
        found = tuple(super().tok_encode(string, add_special_tokens=special))
        check_tokens(found, self.model)
        return found

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


def fitted(tokenizer: Any, model: Any) -> Any:  # noqa: ANN401 (any tokenizer and model)
    """The tokenizer with what lm-eval needs of it: an end of text, and a token to pad with.

    What is missing is taken from the model's settings, and is else the first token, so that no
    token is added which the model has no embedding of.
    """
    settings = greedy_settings(model, 1)
    if tokenizer.eos_token_id is None:
        end = settings.pad_token_id if settings.eos_token_id is not None else 0
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
