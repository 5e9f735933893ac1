"""How much of a comparison is spent in the model: ``python benches/compare_share.py``.

Owed is nine tenths. CPU seconds of one thread on the embedded model, whose forward passes are as
short as any: five criteria, two shares, two budgets, two seeds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.models.loading import load_model, load_tokenizer

CRITERIA = ("reap", "easy_ep", "coverage", "gate_sum", "random")


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, "float32")
    inside, started = [0.0], [0.0]

    def enter(*_):
        started[0] = time.process_time()

    def leave(*_):
        inside[0] += time.process_time() - started[0]

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave)
    documents = [document for part in read_questions() for document in part]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        found = mc.compare(
            model,
            documents[::16],
            documents[1::16],
            out=Path(folder) / "comparison",
            tokenizer=tokenizer or load_tokenizer(MODEL),
            criteria=CRITERIA,
            per=("layer", "model"),
            seeds=2,
        )
        whole = time.process_time() - begun
    print(f"{found}\n{inside[0]:.1f} of {whole:.1f} CPU s in the model: {inside[0] / whole:.1%}")


if __name__ == "__main__":
    main()
