"""Time to resample criteria of tokens and patterns: ``python benches/resample.py RECORDING FIT``.

Processor seconds for 200 draws, reading the recording included; RECORDING with ``--collect
preferences,shift --folds 32``, FIT the folder of a collaboration fitted on it. Set
``POLARS_MAX_THREADS=1`` and ``OMP_NUM_THREADS=1`` for one thread.
"""

from __future__ import annotations

import argparse
import time

import moecollab as mc

CRITERIA = ("frequency", "coverage", "shapley", "ranked_choice", "caep", "pattern_coverage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording")
    parser.add_argument("fit")
    asked = parser.parse_args()
    for criterion in CRITERIA:
        acts = mc.load_activations(asked.recording)
        started = time.process_time()
        found = mc.uncertainty(criterion, acts, collaboration=asked.fit, drop=0.5)
        print(f"{criterion}: {time.process_time() - started:.1f} s, {found!r}", flush=True)


if __name__ == "__main__":
    main()
