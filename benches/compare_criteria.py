"""What each criterion's cut costs on held-out text, over calibration seeds, with intervals.

``python benches/compare_criteria.py --out compare`` uses the questions of the demo;
``--data FOLDER`` uses the corpus that the embedded model was trained on (calibration from its
training split, cost on its held-out split). Writes a Markdown table to stdout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.demo.demo import ATOMS
from moecollab.progress import show, track

CRITERIA = ("caep", "frequency", "gate_sum", "reap", "random")
DROPS = (0.25, 0.5)
HELD_OUT = 8_000  # characters of each domain


def questions(seed: int):
    """A random half of the questions for calibration, the other half held out."""
    documents = [document for part in read_questions() for document in part]
    order = np.random.default_rng(seed).permutation(len(documents))
    half = len(order) // 2
    return [documents[i] for i in order[:half]], [documents[i] for i in order[half:]]


def corpus(folder: Path, seed: int):
    """Twelve thousand training characters of each domain, drawn by seed; held-out text."""
    from moecollab.demo.model_card import held_out_documents
    from moecollab.demo.training_text import read_training_text

    text = read_training_text(folder)
    rng = np.random.default_rng(seed)
    calibration = []
    for domain, texts in text.train.items():
        left = 12_000
        for i in rng.permutation(len(texts)):
            calibration.append({"text": texts[i][: min(left, 3_000)], "domain": domain})
            left -= len(calibration[-1]["text"])
            if left <= 0:
                break
    return calibration, held_out_documents(text, HELD_OUT)


def costs(seed: int, calibration, held_out, out: Path, per: str) -> list[dict]:
    """One row per criterion and drop: extra nats of each document, and its tokens."""
    acts = mc.extract(
        MODEL, calibration, out=out / f"activations-{seed}", dtype="float32", overwrite=True
    )
    collab = mc.HSDL(atoms=ATOMS, rows="sample", seed=seed).fit(acts)
    full = mc.evaluate(MODEL, corpus=held_out, dtype="float32")
    rows = []
    for drop in DROPS:
        for criterion in CRITERIA:
            scores = mc.score(criterion, acts, collaboration=collab, drop=drop, seed=seed)
            with mc.mask(MODEL, mc.plan(scores, drop=drop, per=per), dtype="float32") as masked:
                found = mc.evaluate(masked, corpus=held_out)
            extra = (found.documents["nll"] - full.documents["nll"]).to_numpy()
            tokens = full.documents["tokens"].to_numpy()
            rows.append({"criterion": criterion, "drop": drop, "extra": extra, "tokens": tokens})
    return rows


def interval(parts: list[tuple[np.ndarray, np.ndarray]], resamples: int = 2_000) -> tuple:
    """Mean cost and its 95 % interval; seeds are drawn again, and documents within each."""
    rng = np.random.default_rng(0)
    draws = np.empty(resamples)
    for i in range(resamples):
        total = size = 0.0
        for seed in rng.integers(len(parts), size=len(parts)):
            extra, tokens = parts[seed]
            chosen = rng.integers(len(extra), size=len(extra))
            total, size = total + extra[chosen].sum(), size + tokens[chosen].sum()
        draws[i] = total / size
    mean = sum(e.sum() for e, _ in parts) / sum(t.sum() for _, t in parts)
    return mean, *np.quantile(draws, [0.025, 0.975])


def table(rows: list[dict]) -> str:
    """A Markdown table: criterion, then for each drop the cost, its interval and each seed's."""
    lines = [
        "| criterion | " + " | ".join(f"{d:.0%}: cost, interval (seeds)" for d in DROPS) + " |"
    ]
    lines.append("| --- |" + " --- |" * len(DROPS))
    for criterion in CRITERIA:
        cells = []
        for drop in DROPS:
            parts = [
                (row["extra"], row["tokens"])
                for row in rows
                if row["criterion"] == criterion and row["drop"] == drop
            ]
            mean, low, high = interval(parts)
            seeds = ", ".join(f"{e.sum() / t.sum():.3f}" for e, t in parts)
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}] ({seeds})")
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--data", type=Path, help="folder with corpus/ and facts/")
    parser.add_argument("--per", choices=["layer", "model"], default="layer")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with show(), track("seeds", total=options.seeds) as bar:
        for seed in range(options.seeds):
            parts = corpus(options.data, seed) if options.data else questions(seed)
            rows += costs(seed, *parts, options.out, options.per)
            bar.advance()
    print(table(rows))


if __name__ == "__main__":
    main()
