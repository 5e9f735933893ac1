"""How many sequences fit a forward pass: as asked, or as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from moecollab.patterns.mining import available_memory
from moecollab.progress import say

BatchSize: TypeAlias = int | Literal["auto"]
T = TypeVar("T")
MOST_ROWS = 64
"""Sequences at once at most; more are no faster."""
MOST_ROWS_CPU = 8
"""The same where rows share a few cores."""
SHARE = 0.25
"""Share of the free memory that a batch may take."""


def rows_that_fit(model: Any, window: int, free: int | None) -> int:  # noqa: ANN401
    """Rows of a batch whose logits and hidden states take a quarter of the free memory.

    Parameters
    ----------
    model : causal language model
        Its vocabulary, width and device count.
    window : int
        Tokens of a row.
    free : int or None
        Bytes of free memory; None if it is not known.

    Returns
    -------
    int
        A power of two, at least 1, at most 64, or 8 on the CPU.
    """
    most = MOST_ROWS_CPU if model.device.type == "cpu" else MOST_ROWS
    vocabulary, width = model.get_input_embeddings().weight.shape
    # Logits as they are, as float32 and as log-probabilities; some sixteen states per token.
    row = window * 4 * (3 * vocabulary + 16 * width)
    fits = most if free is None else min(most, int(SHARE * free / row))
    return 1 << max(0, fits.bit_length() - 1)


def in_batches(
    asked: BatchSize,
    model: Any,  # noqa: ANN401 (any causal language model)
    window: int,
    work: Callable[[int], T],
) -> T:
    """What `work` gives for a batch size; for "auto" it is halved for as long as memory is short.

    Raises
    ------
    Exception
        Whatever `work` raises, lack of memory too where the size is given or is 1.
    """
    size = asked if isinstance(asked, int) else rows_that_fit(model, window, _free(model.device))
    while True:
        try:
            return work(size)
        except Exception as cause:
            if isinstance(asked, int) or size == 1 or not _short_of_memory(cause):
                raise
        size //= 2
        say(f"memory is short; batches of {size} from here")
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _free(device: torch.device) -> int | None:
    """Bytes that a device can still give, if it says so."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _short_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that no memory was left."""
    if error is None:
        return False
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out or "can't allocate memory" in str(error) or _short_of_memory(error.__cause__)
