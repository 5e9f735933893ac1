"""How the default weights of HSDL do on all data at hand: the tables of ``docs/defaults.md``.

    python benches/choose_defaults.py demo-run/activations --routing FOLDER

Every setting is fitted with two seeds and judged on samples that were not fitted.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import moecollab as mc
from moecollab.errors import ConvergenceWarning
from moecollab.record.rows import Rows
from real_routing import TASKS, load_routing

GRID = {"sparsity": (1.0, 30.0, 300.0), "reconstruction": (30.0, 300.0, 3000.0)}
SHOWN = ("held_out_error", "live", "members", "codes_per_row", "covered", "stability", "seconds")


def sequences(folder, n_tokens):
    """Token rows of real routing, with chunks of 64 tokens as samples."""
    rows = load_routing(folder, n_tokens)
    chunk = (np.arange(rows.n_rows) // 64).astype(np.uint32)
    return Rows(rows.indptr, rows.sites, rows.values, chunk, rows.n_sites)


def table(name, rows, seeds):
    """Markdown lines of one set of rows."""
    found = mc.HSDL().sweep(rows, seeds=seeds, held_out=0.2, **GRID)
    mean = found.group_by(list(GRID), maintain_order=True).agg(pl.col(SHOWN).mean())
    lines = [f"## {name}: {rows.n_rows:,} rows × {rows.n_sites:,} experts", ""]
    lines += ["| λ₁ | λ₂ | " + " | ".join(SHOWN) + " |", "| ---: " * (2 + len(SHOWN)) + "|"]
    for one, two, *values in mean.iter_rows():
        cells = [f"{value:.3g}" for value in values]
        mark = "**" if (one, two) == (300.0, 300.0) else ""
        lines.append(f"| {mark}{one:g}{mark} | {mark}{two:g}{mark} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--routing", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    acts = mc.load_activations(options.activations)
    sets = {"the demo's tokens": acts.rows("token"), "the demo's samples": acts.rows("sample")}
    if options.routing:
        name = f"DeepSeek-V2-Lite's tokens ({', '.join(TASKS)})"
        sets[name] = sequences(options.routing, options.tokens)
    for name, rows in sets.items():
        print("\n".join(table(name, rows, options.seeds)), flush=True)


if __name__ == "__main__":
    main()
