"""Peak memory and time of streamed fits as tokens grow, with as many rows held at once.

    python benches/stream_memory.py ../shared/data/routing/deepseek-v2-lite --rows 131072,1048576

Token rows are real routing resampled to 27 layers, drawn anew in blocks as they are asked for, so
that the data themselves take no memory. Every fit has a process of its own; a line of a Markdown
table is printed for each.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from beside_adam import numbers
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.streaming import fit_streamed
from real_routing import N_EXPERTS, resampled


class Endless:
    """Activations of so many tokens, made block by block."""

    def __init__(self, folder, n_tokens):
        self.folder, self.n_tokens = folder, n_tokens
        self.layers, self.n_experts = tuple(range(27)), N_EXPERTS
        self.n_sites = 27 * N_EXPERTS

    def token_block(self, start, size, _weights):
        """Rows from `start` on, the same at every call."""
        return resampled(self.folder, min(size, self.n_tokens - start), seed=1 + start)

    def token_blocks(self, weights, size):
        """All rows in order."""
        for start in range(0, self.n_tokens, size):
            yield self.token_block(start, size, weights)

    def digest(self):
        """Nothing on disk."""
        return f"resampled {self.n_tokens}"


def one(options, n_rows):
    """Fits once and prints a line."""
    hsdl = HSDL(
        atoms=options.atoms,
        loss=options.loss,
        threads=options.threads,
        rows_in_memory=options.held,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    found = fit_streamed(hsdl, Endless(options.folder, n_rows), None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    passes = sum("all rows" in row["stage"] for row in found.history)
    line = (options.loss, f"{n_rows:,}", f"{options.held:,}", passes, f"{wall:.0f}", f"{cpu:.0f}")
    print("| " + " | ".join(map(str, (*line, f"{found.objective:.0f}", f"{peak:.2f}"))) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=numbers, default=(131_072, 524_288, 1_048_576))
    parser.add_argument("--held", type=int, default=65_536)
    parser.add_argument("--atoms", type=numbers, default=(128, 512))
    parser.add_argument("--loss", choices=("l1", "l2"), default="l1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.alone:
        return one(options, options.rows[0])
    print("| loss | rows | held | passes | wall s | CPU s | objective | peak GB |", flush=True)
    print("| --- " + "| ---: " * 7 + "|", flush=True)
    for n_rows in options.rows:
        given = [word for word in sys.argv[1:] if not word.startswith("--rows")]
        given = [word for word in given if word != ",".join(map(str, options.rows))]
        subprocess.run(
            [sys.executable, __file__, *given, "--rows", str(n_rows), "--alone"], check=True
        )
    return None


if __name__ == "__main__":
    main()
