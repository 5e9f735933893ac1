"""What a mask costs over the bare forward pass, and how long a cut in memory takes, in one run.

    python benches/mask_overhead.py            # 64 experts of 1,024 × 768, top 8; then 26 × 64

A random Qwen3-MoE model reads batches of 2,048 tokens: bare, and with each mode of mask keeping all
experts, so that what is computed is the same. The ways take turns; ratios are of neighbouring runs,
in CPU seconds, since others use the machine. Then a model of 26 layers of 64 experts in bfloat16 is
cut to half of them.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch

from moecollab.models.gains import Blocked
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.pruning import prune
from record_overhead import build

WAYS = {
    "bare": lambda model, keep: nullcontext(),
    "reroute": Mask,
    "zero": lambda model, keep: Blocked(model, keep, "zero"),
    "renormalise": lambda model, keep: Blocked(model, keep, "renormalise"),
}


def keeping(model, count):
    """A plan that keeps the first experts of every layer."""
    layers = find_moe_layers(model)
    kept = {layer.layer: tuple(range(count)) for layer in layers}
    return Keep(kept, layers[0].n_experts, layers[0].top_k)


def forwards(options):
    """Prints a table of forward passes."""
    model = build(options)
    keep = keeping(model, options.experts)
    ids = torch.randint(0, 4096, (4, options.tokens // 4))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.inference_mode():
        for _ in range(options.rounds + 1):
            for name, way in WAYS.items():
                with way(model, keep):
                    before = time.process_time()
                    model.base_model(input_ids=ids, use_cache=False)
                    times[name].append(time.process_time() - before)
    print(f"{options}\n\n| mask | CPU s a batch | over bare, quartiles |\n|---|--:|--:|")
    for name, spent in times.items():
        ratios = [one / base for one, base in zip(spent[1:], times["bare"][1:], strict=True)]
        low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        shown = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})" if name != "bare" else ""
        print(f"| {name} | {statistics.median(spent[1:]):.3f} | {shown} |")


def cut(options):
    """Prints how long it takes to cut a model that is loaded."""
    options.layers, options.hidden, options.inner = 26, 512, 512
    options.experts, options.dtype = 64, "bfloat16"
    model = build(options)
    size = sum(one.numel() * one.element_size() for one in model.parameters()) / 1e9
    before = time.perf_counter()
    prune(model, keeping(model, 32))
    spent = time.perf_counter() - before
    assert {layer.n_experts for layer in find_moe_layers(model)} == {32}
    print(f"\ncut 26 × 64 experts ({size:.1f} GB) to 32 in {spent:.1f} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 1024), ("inner", 768), ("experts", 64), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("layers", 3), ("tokens", 2048), ("threads", 1), ("rounds", 11)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    forwards(options)
    cut(options)


if __name__ == "__main__":
    main()
