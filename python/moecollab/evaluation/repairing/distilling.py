"""Training some parameters of a model until it predicts what another does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.criteria.probing.probing import differentiable
from moecollab.errors import DataError, SettingsError
from moecollab.evaluation.perplexity import Window
from moecollab.evaluation.repairing.trainable import Trainable
from moecollab.progress import track

LOOKS = 10
"""Times that the held-out text is looked at in a whole run."""

PATIENCE = 3
"""Looks without gain after which a run ends."""


@dataclass(frozen=True)
class Course:
    """How long and how fast to train.

    Parameters
    ----------
    steps : int
        Batches.
    minutes : float, optional
        Time after which the run ends wherever it is.
    rate : float
        Adam's step size at the start; it falls to 0 in a straight line.
    batch_size : int
        Windows per batch.
    seed : int
        Of the order of the windows.
    """

    steps: int
    minutes: float | None
    rate: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Refuses numbers that are out of range."""
        for name, least in (("steps", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(name, getattr(self, name), f"{least} or more")
        for name in ("rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(name, value, "above 0 and finite")


class Pair:
    """A teacher, and a student of which some parameters are trained.

    Parameters
    ----------
    student : Trainable
        What is trained.
    teacher : causal language model
        May be the student's model, whose own parameters are in place while it teaches.
    """

    def __init__(self, student: Trainable, teacher: Any) -> None:  # noqa: ANN401
        self.student = student
        self.teacher = teacher

    def divergence(self, windows: Sequence[Window]) -> Tensor:
        """KL(teacher ‖ student) of each window in nats, summed over its tokens: (n_windows,)."""
        with torch.no_grad():
            wanted = _log_probabilities(self.teacher, windows)
        with self.student.placed():
            got = _log_probabilities(self.student.model, windows)
        each = (wanted.exp() * (wanted - got)).sum(dim=-1)  # (n_windows, n_tokens)
        real = _padded(windows)[1].to(each.device)
        return (each * real).sum(dim=1)

    def measure(self, windows: Sequence[Window], batch_size: int) -> NDArray[np.float64]:
        """The same without gradients, of any number of windows: float64 (n_windows,)."""
        with torch.no_grad():
            parts = [
                self.divergence(windows[start : start + batch_size]).double().cpu().numpy()
                for start in range(0, len(windows), batch_size)
            ]
        return np.concatenate(parts)


def distil(
    pair: Pair, windows: Sequence[Window], held_out: Sequence[Window], course: Course
) -> int:
    """Trains the student and leaves it at the best state seen on held-out text, the first included.

    The loss is the mean of KL(teacher ‖ student) over the tokens of a batch; Adam in float32.

    Returns
    -------
    int
        Steps taken.

    Raises
    ------
    DataError
        When the divergence is not finite.
    """
    student = pair.student
    adam = torch.optim.Adam(student.copies, lr=course.rate)
    best, state = _look(pair, held_out, course), student.state()
    every, waited, ends = max(1, course.steps // LOOKS), 0, _clock(course.minutes)
    with differentiable(student.model), track("repairing the routers", course.steps) as bar:
        for step, batch in enumerate(_batches(windows, course), 1):
            for group in adam.param_groups:
                group["lr"] = course.rate * (1 - (step - 1) / course.steps)
            _step(pair, batch, adam)
            bar.advance()
            last = step == course.steps or ends()
            if not (last or step % every == 0):
                continue
            found = _look(pair, held_out, course)
            waited = 0 if found < best else waited + 1
            if found < best:
                best, state = found, student.state()
            if last or waited == PATIENCE:
                break
    student.load(state)
    return step if course.steps else 0


def _step(pair: Pair, batch: Sequence[Window], adam: torch.optim.Adam) -> None:
    loss = pair.divergence(batch).sum() / sum(len(window.ids) for window in batch)
    if not bool(loss.isfinite()):
        raise DataError(
            "the divergence from the teacher is not finite; lower rate, or load as float32"
        )
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()


def _look(pair: Pair, windows: Sequence[Window], course: Course) -> float:
    return float(pair.measure(windows, course.batch_size).sum())


def _clock(minutes: float | None) -> Callable[[], bool]:
    """A function that says whether the time is over."""
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    return lambda: ends is not None and time.monotonic() >= ends


def _batches(windows: Sequence[Window], course: Course) -> Iterator[list[Window]]:
    """As many batches as steps: all windows in random order, then again in another."""
    rng = np.random.default_rng(course.seed)
    waiting: list[int] = []
    for _ in range(course.steps):
        while len(waiting) < course.batch_size:
            waiting += rng.permutation(len(windows)).tolist()
        yield [windows[row] for row in waiting[: course.batch_size]]
        waiting = waiting[course.batch_size :]


def _padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Token ids and where they are real, padded on the right: both (n_windows, n_tokens)."""
    ids = [torch.tensor(window.ids) for window in windows]
    real = [torch.ones_like(one) for one in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(real, batch_first=True)


def _log_probabilities(model: Any, windows: Sequence[Window]) -> Tensor:  # noqa: ANN401
    """Logarithms of the next-token probabilities in float32: (n_windows, n_tokens, n_words)."""
    ids, real = (part.to(model.device) for part in _padded(windows))
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    found: Tensor = logits.float().log_softmax(dim=-1)
    return found
