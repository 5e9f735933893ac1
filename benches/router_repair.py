"""What router repair brings on the embedded model: python benches/router_repair.py DATA.

The demo's model is pruned by `coverage`, repaired on the calibration text, and judged on held-out
text of other documents, which repair never sees. The text is that of `study_criteria.py`.
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
from moecollab.evaluation.intervals import paired_interval
from moecollab.evaluation.perplexity import HeldOut, document_losses
from moecollab.models.loading import load_model
from moecollab.record.corpus import read_corpus


def main(
    data: Annotated[Path, typer.Argument(help="Folder with corpus/ and facts/")],
    seeds: Annotated[int, typer.Option(help="Calibrations")] = 3,
    drops: Annotated[str, typer.Option(help="Shares between commas")] = "0.25,0.5",
    steps: Annotated[int, typer.Option(help="Batches")] = 200,
    every: Annotated[int, typer.Option(help="Judge by every so many held-out documents")] = 1,
    rate: Annotated[float, typer.Option(help="Adam's step size")] = 1e-3,
) -> None:
    """Prints a line of Markdown per share and calibration."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(
        "merge_methods", Path(__file__).with_name("merge_methods.py")
    )
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    pool, held_out = methods.corpora(data)
    whole, tokenizer = load_model(MODEL, "float32")
    text = HeldOut.read(tokenizer, read_corpus(held_out[::every]), 512)
    full = document_losses(whole, text, batch_size=32)
    size, base = full["tokens"].to_numpy().astype(np.float64), full["nll"].to_numpy()
    print("| dropped | seed | loss added | after repair | gain | KL before | after | steps | min |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for drop in map(float, drops.split(",")):
        for seed in range(seeds):
            documents = methods.drawn(pool, seed)
            with tempfile.TemporaryDirectory() as folder:
                acts = methods.recorded(whole, tokenizer, documents, folder)
                plan = mc.plan(mc.score("coverage", acts, drop=drop), drop=drop)
            cut = document_losses(mc.prune(copy.deepcopy(whole), plan), text, batch_size=32)
            start = time.perf_counter()
            found = mc.repair(
                copy.deepcopy(whole), documents, plan=plan, steps=steps, rate=rate, seed=seed
            )
            minutes = (time.perf_counter() - start) / 60
            after = document_losses(found.model, text, batch_size=32)["nll"].to_numpy()
            before = cut["nll"].to_numpy()
            low, high = paired_interval(before, after, size, seed=0)
            print(
                f"| {drop:.0%} | {seed} | {(before - base).sum() / size.sum():.3f} "
                f"| {(after - base).sum() / size.sum():.3f} "
                f"| {(before - after).sum() / size.sum():+.3f} [{low:+.3f}, {high:+.3f}] "
                f"| {found.before:.3f} | {found.after:.3f} | {found.steps} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
