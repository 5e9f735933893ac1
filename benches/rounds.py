"""What dropping in rounds gains: ``python benches/rounds.py [--seeds 5] [--rounds 4]``.

Embedded model and questions; each seed splits the questions anew, half to record and half to
measure. Printed: loss added on the other half, in nats per token, when half of every layer's
experts went at once and in rounds, and the paired difference with its standard error over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.models.loading import load_model, load_tokenizer

CRITERIA = ("reap", "ean_mean", "gate_sum", "frequency")
DROP = 0.5
Text = Sequence[dict[str, str]]


class Split:
    """The questions in halves, and a model to record and measure on them."""

    def __init__(self, seed: int) -> None:
        documents = [document for part in read_questions() for document in part]
        order = np.random.default_rng(seed).permutation(len(documents)).tolist()
        half = len(order) // 2
        self.text: Text = [documents[number] for number in order[:half]]
        self.held_out: Text = [documents[number] for number in order[half:]]
        self.model, found = load_model(MODEL, "float32")
        self.tokenizer = found or load_tokenizer(MODEL)
        self.whole = self._measured(self.model)

    def added(self, criterion: str, rounds: int, folder: Path) -> float:
        """Loss added when half of every layer went, in nats per token."""
        plan = mc.iterate(
            self.model,
            self.text,
            criterion,
            drop=DROP,
            rounds=rounds,
            out=folder / f"{criterion}-{rounds}",
            tokenizer=self.tokenizer,
        )
        with mc.mask(self.model, plan) as masked:
            return self._measured(masked) - self.whole

    def _measured(self, model: object) -> float:
        """Loss on the other half, in nats per token."""
        found = mc.evaluate(model, corpus=self.held_out, tokenizer=self.tokenizer).documents
        return float(found["nll"].sum() / found["tokens"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    added = np.empty((len(CRITERIA), asked.seeds, 2))
    for seed in range(asked.seeds):
        split = Split(seed)
        for row, criterion in enumerate(CRITERIA):
            with tempfile.TemporaryDirectory() as folder:
                for column, rounds in enumerate((1, asked.rounds)):
                    added[row, seed, column] = split.added(criterion, rounds, Path(folder))
            print(f"seed {seed} {criterion}: {added[row, seed].round(3)}", flush=True)
    print(f"criterion: 1 round, {asked.rounds} rounds, difference ± standard error")
    for criterion, (once, more) in zip(CRITERIA, added.transpose(0, 2, 1), strict=True):
        gain = more - once
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
        means = f"{once.mean():.3f}, {more.mean():.3f}"
        print(f"{criterion}: {means}, {gain.mean():+.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
