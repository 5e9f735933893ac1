"""Claim A10: what pruning by CAEP costs when one of the regularisers is dropped.

``python benches/check_regularisers.py --out FOLDER``: the embedded model, half of the demo's
questions for calibration, the other half held out; a quarter of each layer's experts dropped.
"""

import argparse
from pathlib import Path

import numpy as np

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.demo.demo import ATOMS
from moecollab.progress import show, track

VARIANTS = {
    "both": {},
    "no dictionary size": {"dictionary_size": 0.0},
    "no sparsity": {"sparsity": 0.0},
}
DROP = 0.25


def questions(seed: int):
    """A random half of the questions for calibration, the other half held out."""
    documents = [document for part in read_questions() for document in part]
    order = np.random.default_rng(seed).permutation(len(documents))
    half = len(order) // 2
    return [documents[i] for i in order[:half]], [documents[i] for i in order[half:]]


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


def costs(seed, out):
    """Extra nats of each held-out document, its tokens and the experts dropped, by variant."""
    calibration, held_out = questions(seed)
    acts = mc.extract(
        MODEL, calibration, out=out / f"activations-{seed}", dtype="float32", overwrite=True
    )
    full = mc.evaluate(MODEL, corpus=held_out, dtype="float32").documents
    tokens, found = full["tokens"].to_numpy(), {}
    for name, settings in VARIANTS.items():
        collab = mc.HSDL(atoms=ATOMS, rows="sample", seed=seed, **settings).fit(acts)
        plan = mc.plan(mc.score("caep", acts, collaboration=collab, drop=DROP), drop=DROP)
        with mc.mask(MODEL, plan, dtype="float32") as masked:
            cut = mc.evaluate(masked, corpus=held_out).documents
        extra = (cut["nll"] - full["nll"]).to_numpy()
        found[name] = (
            extra,
            tokens,
            {(layer, one) for layer, gone in plan.dropped.items() for one in gone},
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = []
    with show(), track("seeds", total=options.seeds) as bar:
        for seed in range(options.seeds):
            runs.append(costs(seed, options.out))
            bar.advance()
    print("| regularisers | cost in nats a token, interval | same experts dropped as with both |")
    print("| --- | --- | ---: |")
    for name in VARIANTS:
        mean, low, high = interval([run[name][:2] for run in runs])
        same = [len(run[name][2] & run["both"][2]) / len(run["both"][2]) for run in runs]
        print(f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {sum(same) / len(same):.0%} |")


if __name__ == "__main__":
    main()
