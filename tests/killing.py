"""Kills recordings or prunings of the embedded model at random moments; run by test_kills.py.

Children are forked from a process that has imported everything, the model's code too, and run
nothing, so that a run takes a fraction of a second. A run that was killed again and again gets
longer and longer, so that every run ends. Prints what happened as JSON.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers.models.qwen2_moe import modeling_qwen2_moe  # noqa: F401  # the embedded model's

from moecollab.demo.demo import MODEL
from moecollab.manifest import digest_file
from moecollab.models.keep import Keep
from moecollab.pruning import pruning
from moecollab.record import extraction, windows

N_DOCUMENTS, SHARD = 30, 400


def record(target: Path) -> None:
    """One recording, in many small shards."""
    torch.set_num_threads(1)  # other numbers may round differently
    group = windows.group_shards
    extraction.group_shards = lambda samples: group(samples, SHARD)
    texts = [
        {
            "text": f"Question {i}: what is {i} times {i + 7}? " * 12,
            "domain": "odd" if i % 2 else "even",
        }
        for i in range(N_DOCUMENTS)
    ]
    extraction.extract(MODEL, texts, out=target, collect="shift,pairs,vocabulary")


def prune(target: Path) -> None:
    """One pruning of the folder, into many small files."""
    keep = Keep({layer: tuple(range(0, 24, 2)) for layer in range(6)}, 24, 3)
    pruning.prune(MODEL, keep, out=target, shard_size="200KB")


WORKS = {"record": record, "prune": prune}


def start(work, target: Path) -> int:
    """A child that works."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(target)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return child


def ended(child: int, seconds: float) -> int | None:
    """Exit status of a child that ended in this time."""
    until = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def digests(folder: Path) -> dict[str, str]:
    """Of all files."""
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


def main(work, folder: Path, n_kills: int, seed: int) -> None:
    """Kills and goes on until there were enough kills, comparing every run that ends."""
    rng = random.Random(seed)
    began = time.monotonic()
    if ended(start(work, folder / "whole"), 600) != 0:
        raise SystemExit("the undisturbed run failed")
    took = time.monotonic() - began
    whole, found = digests(folder / "whole"), {"kills": 0, "equal": 0, "unequal": 0, "failed": 0}
    while found["kills"] < n_kills:
        target = folder / f"run{found['equal'] + found['unequal'] + found['failed']}"
        for attempt in itertools.count():
            if target.exists() and not (folder / f".{target.name}.partial").exists():
                status = 0  # killed when all was done
                break
            child = start(work, target)
            status = ended(child, rng.uniform(0, took * 1.1**attempt))
            if status is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["kills"] += 1
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        same = status == 0 and digests(target) == whole and not left
        found["failed" if status else "equal" if same else "unequal"] += 1
        shutil.rmtree(target, ignore_errors=True)
    sys.stdout.write(json.dumps(found | {"seconds": round(took, 2)}) + "\n")


if __name__ == "__main__":
    main(WORKS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
