"""Time and memory of the two-level fit as rows grow: real routing resampled to the paper's shape.

    python benches/scale_hsdl.py ../shared/data/routing/deepseek-v2-lite --rows 10000,100000,604109

Prints a line of a Markdown table per number of rows.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from beside_adam import numbers
from moecollab.patterns.dictionary import HSDL
from real_routing import resampled


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=numbers, default=(10_000, 30_000, 100_000))
    parser.add_argument("--atoms", type=numbers, default=(512, 2048))
    parser.add_argument("--loss", choices=("l1", "l2"), default="l1")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| rows | threads | wall s | CPU s | CPU µs a row | objective | peak GB |", flush=True)
    print("| ---: " * 7 + "|")
    for n_rows in options.rows:
        rows = resampled(options.folder, n_rows)
        hsdl = HSDL(atoms=options.atoms, loss=options.loss, threads=options.threads)
        wall, cpu = time.perf_counter(), time.process_time()
        found = hsdl.fit(rows)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        line = (f"{n_rows:,}", options.threads, f"{wall:.1f}", f"{cpu:.1f}")
        more = (f"{cpu / n_rows * 1e6:.0f}", f"{found.objective:.0f}", f"{peak:.1f}")
        print("| " + " | ".join(map(str, line + more)) + " |", flush=True)


if __name__ == "__main__":
    main()
