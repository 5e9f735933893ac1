"""HSDL beside the Adam twin on real routing: time to the twin's last objective, and both last ones.

    python benches/beside_adam.py ../shared/data/routing/deepseek-v2-lite --checkpoint twin.pt

The twin takes hours at full size: stop it when you like, it goes on from its checkpoint. Both run
on as many threads; a table in Markdown is printed at the end.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from adam_twin import AdamTwin
from moecollab._core import fit_dictionary
from real_routing import load_routing


def ours(rows, options):
    """(seconds, cpu seconds, record) after every iteration."""
    begin, cpu, trace = time.perf_counter(), time.process_time(), []
    settings = {
        "atoms": options.atoms,
        "copies": True,
        "dictionary_size": 1.0,
        "sparsity": options.sparsity,
        "reconstruction": options.reconstruction,
        "max_iterations": 100,
        "tolerance": 1e-3,
        "seed": 0,
        "threads": options.threads,
    }
    arrays = (rows.indptr, rows.sites, rows.values)

    def watch(record):
        trace.append((time.perf_counter() - begin, time.process_time() - cpu, record))

    found = fit_dictionary(arrays, rows.n_sites, settings, watch)
    trace.append((time.perf_counter() - begin, time.process_time() - cpu, found["history"][-1]))
    return trace


def table(trace, twin, best):
    """Markdown: when ours passed the twin's last objective, and how long each took."""
    joint = [row for row in trace if row[2]["stage"].startswith(("joint", "final"))]
    reached = next((row for row in joint if row[2]["total"] <= best), None)
    last = trace[-1]
    lines = [
        "| | objective | wall s | CPU s |",
        "| --- | ---: | ---: | ---: |",
        f"| Adam twin, {twin.epochs} epochs a stage | {best:.1f} | {twin.seconds:.0f} "
        f"| {twin.cpu:.0f} |",
        f"| HSDL, end | {last[2]['total']:.1f} | {last[0]:.1f} | {last[1]:.1f} |",
    ]
    if reached:
        wall, cpu = twin.seconds / reached[0], twin.cpu / reached[1]
        lines.append(
            f"| HSDL, at the twin's objective | {reached[2]['total']:.1f} | "
            f"{reached[0]:.1f} ({wall:.0f}× sooner) | {reached[1]:.1f} ({cpu:.0f}×) |"
        )
    return "\n".join(lines)


def numbers(text):
    """Whole numbers between commas."""
    return tuple(int(number) for number in text.split(","))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--atoms", type=numbers, default=(512, 2048))
    parser.add_argument("--sparsity", type=float, default=300.0)
    parser.add_argument("--reconstruction", type=float, default=300.0)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = load_routing(options.folder, options.rows)
    print(f"{rows!r}, atoms {options.atoms}, threads {options.threads}", flush=True)
    trace = ours(rows, options)
    for seconds, cpu, row in trace:
        print(f"{seconds:8.1f} s, CPU {cpu:8.1f} s: {row['stage']} {row['total']:.1f}", flush=True)
    twin = AdamTwin(
        torch.from_numpy(np.ascontiguousarray(rows.dense())),
        options.atoms,
        options.sparsity,
        options.reconstruction,
        options.epochs,
        options.rate,
        checkpoint=options.checkpoint,
    )

    def watch(stage, epoch, seconds, cpu, total):
        if epoch % 100 == 0:
            print(f"twin stage {stage} epoch {epoch}: {total:.1f}, {seconds:.0f} s", flush=True)

    best = twin.fit(watch)
    print(table(trace, twin, best))


if __name__ == "__main__":
    main()
