"""How much of a comparison is spent in the model: ``python benches/compare_share.py``.

Owed is nine tenths. CPU seconds of one thread, from after the imports, on the embedded model, whose
forward passes are as short as any: five criteria, two shares, two budgets, two seeds (some 30 cuts)
on half of the demo's text. Time is the model's while its ``forward`` runs (with what a recording
listens to inside) and while the loss is taken from its logits, for which transformers' own forward
would give the mean alone; the second has its own line. What remains is told by what it was spent
on, without what was called from there and has a line of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import scipy.stats  # noqa: F401 (imported late by the package, and not to be timed)
import torch

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.evaluation import perplexity
from moecollab.evaluation.comparing import calibrating, comparison, measuring, running
from moecollab.models.loading import load_model, load_tokenizer

CRITERIA = ("reap", "easy_ep", "coverage", "gate_sum", "random")
FORWARD, LOSS = "model: forward", "model: loss from logits"
PARTS = {
    LOSS: (perplexity, "_sequence_loss"),
    "rest of measuring loss": (measuring, "document_losses"),
    "masking": (measuring, "Mask"),
    "files of cuts": (measuring.Evaluation, "save"),
    "recording": (calibrating, "extract"),
    "scores": (calibrating, "score"),
    "plans": (calibrating, "plan"),
    "digest of the model": (running, "open_subject"),
    "tokens of the held-out text": (running.HeldOut, "read"),
    "tables": (running, "tidy"),
    "reading the tables": (running, "load_comparison"),
    "reading files of cuts": (comparison, "load_evaluation"),
}


class Clock:
    """CPU seconds by what they were spent on, each counted once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[str] = ["the rest"]
        self._since = time.process_time()

    def enter(self, name: str) -> None:
        """Time is this one's from now on."""
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        """Time is again that of whoever called."""
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        self.spent[self._open[-1]] += now - self._since
        self._since = now

    def watched(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name."""

        @wraps(plain, updated=())
        def run(*given: Any, **options: Any) -> Any:
            self.enter(name)
            try:
                return plain(*given, **options)
            finally:
                self.leave()

        return run


@contextmanager
def watching(clock: Clock, model: torch.nn.Module) -> Iterator[None]:
    """Times the parts while the block runs."""
    model.register_forward_pre_hook(lambda *_: clock.enter(FORWARD))
    model.register_forward_hook(lambda *_: clock.leave())
    kept = {name: getattr(*place) for name, place in PARTS.items()}
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, clock.watched(name, kept[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, kept[name])


def main() -> None:
    """Runs the comparison and prints where its time went, the most first."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, "float32")
    calibration, held_out = read_questions()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, watching(clock, model):
        clock.enter("the rest")
        found = mc.compare(
            model,
            calibration[::2],
            held_out[::2],
            out=Path(folder) / "comparison",
            tokenizer=tokenizer or load_tokenizer(str(MODEL)),
            criteria=CRITERIA,
            per=("layer", "model"),
            seeds=2,
        )
        clock.leave()
    whole = sum(clock.spent.values())
    inside = clock.spent[FORWARD] + clock.spent[LOSS]
    print(f"{found}\n{inside:.1f} of {whole:.1f} CPU s in the model: {inside / whole:.1%}")
    for name, seconds in sorted(clock.spent.items(), key=lambda one: -one[1]):
        print(f"{seconds:8.2f} s  {seconds / whole:6.2%}  {name}")


if __name__ == "__main__":
    main()
