"""Peak memory of a recording above that of the model alone, against the length of the text.

    python benches/record_memory.py                       # 65 k, 262 k and 1,049 k tokens

The embedded model reads text of its demo, repeated, alone and while it is recorded, in the same
batches; every run has a process of its own. With --collect more is summed.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTHS = (65_536, 262_144, 1_048_576)


def child(options) -> None:
    """One run in this process; prints peak memory in MB and seconds."""
    import moecollab as mc
    from moecollab.demo.demo import MODEL

    before = time.perf_counter()
    if options.bare:
        read(MODEL, options.corpus, options.tokens)
    else:
        path = Path(options.folder) / "acts"
        mc.extract(MODEL, options.corpus, out=path, tokens=options.tokens, collect=options.collect)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{peak:.0f} {time.perf_counter() - before:.1f}")


def read(path, corpus: str, n_tokens: int) -> None:
    """The model alone, on the batches that a recording makes."""
    import numpy as np
    import torch

    from moecollab.models.loading import load_model
    from moecollab.record.corpus import read_corpus
    from moecollab.record.reading import cut_batches
    from moecollab.record.windows import group_shards, select_samples

    model, tokenizer = load_model(path)

    def tokenize(text: str):
        return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.uint32)

    samples = select_samples(read_corpus(corpus), tokenize, limit=n_tokens, seed=0)
    with torch.inference_mode():
        for shard in group_shards(samples):
            for batch in cut_batches([samples[number] for number in shard], 512, 8):
                model.base_model(**batch.inputs(model.device)[0])


def measure(options, tokens: int, corpus: Path, *, bare: bool) -> tuple[float, float]:
    """Peak memory and seconds of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", "--folder", folder]
        command += ["--tokens", str(tokens), "--corpus", str(corpus), "--collect", options.collect]
        command += ["--bare"] if bare else []
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = run.stdout.split()
    return float(peak), float(seconds)


def write_corpus(path: Path, n_tokens: int) -> None:
    """Documents of the demo with numbers among them, more than enough for so many tokens."""
    import json

    from moecollab.demo import read_questions

    calibration, held_out = read_questions()
    found = [*calibration, *held_out]
    with path.open("w") as file:
        length, number = 0, 0
        while length < 6 * n_tokens:
            one = found[number % len(found)]
            text = f"{number} " + one["text"] * 4
            file.write(json.dumps({"text": text, "domain": one["domain"]}) + "\n")
            length, number = length + len(text), number + 1


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", default="")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--folder", default="")
    parser.add_argument("--corpus", default="")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, max(options.lengths))
        print("| tokens | the model alone | recording | more | tokens/s |\n|--:|--:|--:|--:|--:|")
        for tokens in options.lengths:
            base, _ = measure(options, tokens, corpus, bare=True)
            peak, seconds = measure(options, tokens, corpus, bare=False)
            cells = f"{base:.0f} MB | {peak:.0f} MB | {peak - base:.0f} MB"
            print(f"| {tokens:,} | {cells} | {tokens / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
