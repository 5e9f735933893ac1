"""What merging costs beside dropping, on the embedded model: python benches/merge_methods.py DATA.

Held-out loss of the demo's model after each method has brought every layer to the same number of
experts, for some calibrations drawn from the same pool. The text is that of `study_criteria.py`.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import moecollab as mc
from moecollab.demo import MODEL
from moecollab.demo.training_text import read_training_text
from moecollab.evaluation.intervals import paired_interval
from moecollab.evaluation.perplexity import HeldOut, document_losses
from moecollab.models.loading import load_model
from moecollab.record.corpus import read_corpus
from moecollab.record.windows import select_samples

# Name, method, criterion of the plan, options.
MERGED = (
    ("hc_smoe", "hc_smoe", "frequency", {}),
    ("hc_smoe, rows averaged", "hc_smoe", "frequency", {"router": "mean"}),
    ("m_smoe", "m_smoe", "frequency", {}),
    ("m_smoe around coverage", "m_smoe", "coverage", {}),
    ("dek", "dek", "frequency", {}),
    ("ream", "ream", "reap", {}),
    ("ream around coverage", "ream", "coverage", {}),
)
DROPPED = ("coverage", "reap", "frequency")
TOKENS = 2_048
"""Tokens of the calibration on which merging runs all experts."""


def corpora(data: Path):
    """Calibration and held-out documents, as the study of criteria makes them."""
    path = Path(__file__).with_name("study_criteria.py")
    spec = importlib.util.spec_from_file_location("study_criteria", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.corpora(read_training_text(data))


def drawn(pool: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Half of the calibration pool, drawn by a seed."""
    chosen = np.random.default_rng(seed).permutation(len(pool))[: len(pool) // 2]
    return [pool[row] for row in sorted(chosen.tolist())]


def probe(tokenizer, documents):
    """Token ids of a seeded choice of the documents, as the recording's."""
    chosen = select_samples(
        read_corpus(documents),
        lambda text: np.asarray(tokenizer(text, verbose=False)["input_ids"], np.uint32),
        limit=TOKENS,
        seed=0,
    )
    return [sample.ids.astype(np.int64) for sample in chosen]


def loss(model, text: HeldOut) -> np.ndarray:
    """Summed loss of every document."""
    return document_losses(model, text, batch_size=32)["nll"].to_numpy()


def recorded(whole, tokenizer, documents, folder):
    """Activations of a calibration, for the criteria of the plans."""
    out = Path(folder) / "acts"
    return mc.extract(
        whole, documents, out=out, tokenizer=tokenizer, tokens=2 * TOKENS, collect="shift"
    )


def measure(whole, tokenizer, pool, text, drop: float, seed: int) -> dict[str, np.ndarray]:
    """Loss of every held-out document, by method, for one calibration."""
    documents = drawn(pool, seed)
    with tempfile.TemporaryDirectory() as folder:
        acts = recorded(whole, tokenizer, documents, folder)
        plans = {name: mc.plan(mc.score(name, acts, drop=drop), drop=drop) for name in DROPPED}
    text_of, losses = probe(tokenizer, documents), {}
    for name in DROPPED:
        made = mc.prune(copy.deepcopy(whole), plans[name])
        losses[f"drop by {name}"] = loss(made, text)
    for name, how, criterion, options in MERGED:
        start = time.perf_counter()
        small = copy.deepcopy(whole)
        made = mc.merge(small, plans[criterion], how=how, corpus=text_of, **options)
        losses[name] = loss(made, text)
        typer.echo(f"{drop:.0%} seed {seed} {name} {time.perf_counter() - start:.0f} s", err=True)
    return losses


def main(
    data: Annotated[Path, typer.Argument(help="Folder with corpus/ and facts/")],
    seeds: Annotated[int, typer.Option(help="Calibrations")] = 3,
    drops: Annotated[str, typer.Option(help="Shares between commas")] = "0.25,0.5",
    every: Annotated[int, typer.Option(help="Judge by every so many held-out documents")] = 1,
) -> None:
    """Prints a Markdown table: loss added, and how much more than dropping by coverage."""
    torch.set_num_threads(1)
    pool, held_out = corpora(data)
    whole, tokenizer = load_model(MODEL, "float32")
    text = HeldOut.read(tokenizer, read_corpus(held_out[::every]), 512)
    full = document_losses(whole, text, batch_size=32)
    size = full["tokens"].to_numpy().astype(np.float64)
    base = full["nll"].to_numpy()
    print(f"{len(size)} documents, {int(size.sum())} tokens, loss {base.sum() / size.sum():.4f}")
    for drop in map(float, drops.split(",")):
        found = [measure(whole, tokenizer, pool, text, drop, seed) for seed in range(seeds)]
        rows = []
        for name in found[0]:
            costs = [float((one[name] - base).sum() / size.sum()) for one in found]
            typer.echo(f"{drop:.0%} {name} {costs}", err=True)
            mean = np.mean([one[name] for one in found], axis=0)
            reference = np.mean([one["drop by coverage"] for one in found], axis=0)
            gap = (mean - reference).sum() / size.sum()
            low, high = paired_interval(mean, reference, size, seed=0)
            rows.append((name, float(np.mean(costs)), min(costs), max(costs), gap, low, high))
        print(f"\n{drop:.0%} of the experts go\n")
        print("| method | loss added | of seeds | more than dropping by coverage |")
        print("| --- | --- | --- | --- |")
        for name, cost, least, most, gap, low, high in sorted(rows, key=lambda row: row[1]):
            print(
                f"| {name} | {cost:.3f} | {least:.3f} to {most:.3f} | "
                f"{gap:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )


if __name__ == "__main__":
    typer.run(main)
