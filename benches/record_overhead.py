"""What recording costs over the bare forward pass, at a realistic layer size, in one run.

    python benches/record_overhead.py                     # 64 experts of 1,024 × 768, top 8
    python benches/record_overhead.py --experts 128 --hidden 2048 --layers 2

A random Qwen3-MoE model reads batches of 2,048 tokens: bare, with the routing recorded, and with
more and more summed. The ways take turns; ratios are of neighbouring runs, medians are shown with
their quartiles. Adding up and putting into columns is part of the time, writing to disk is not.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moecollab.models.routing import find_moe_layers
from moecollab.record.recorder import Recorder
from moecollab.record.tallying import Tokens, tally

WAYS: dict[str, tuple[str, ...] | None] = {
    "bare": None,
    "routing": (),
    "norms": ("norms",),
    "norms, shift": ("norms", "shift"),
    "all": ("norms", "shift", "channels", "pairs", "vocabulary"),
}


def build(options):
    """A model with random weights, ready to run."""
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        moe_intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        head_dim=64,
        vocab_size=4096,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(getattr(torch, options.dtype)).eval()


def bare(model, ids, _domain) -> None:
    """One forward pass."""
    model.base_model(input_ids=ids, use_cache=False)


def recorded(groups: tuple[str, ...]) -> Callable[..., None]:
    """One forward pass with what is asked for recorded and added up."""

    def run(model, ids, domain):
        layers = find_moe_layers(model)
        norms, real = "norms" in groups, torch.ones(ids.numel(), dtype=torch.bool)
        with Recorder(
            layers,
            norms=norms,
            channels="channels" in groups,
            shift=model if "shift" in groups else None,
            n_domains=2,
        ) as recorder:
            recorder.begin(real, torch.from_numpy(domain))
            model.base_model(input_ids=ids, use_cache=False)
            found = recorder.take(real)
        tokens = Tokens(domain, ids.reshape(-1).numpy(), np.arange(ids.numel()))
        tally(("one", "two"), tokens, found, layers[0].n_experts, ("routing", *groups))

    return run


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options)
    ids = torch.randint(0, 4096, (4, options.tokens // 4))
    domain = np.repeat(np.arange(2), ids.numel() // 2)
    ways = {name: bare if groups is None else recorded(groups) for name, groups in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(options.rounds + 1):
            for name, run in ways.items():
                before = time.perf_counter()
                run(model, ids, domain)
                times[name].append(time.perf_counter() - before)
    print(f"{options}\n\n| recorded | s a batch | over bare, quartiles |\n|---|--:|--:|")
    for name, spent in times.items():
        ratios = [one / base for one, base in zip(spent[1:], times["bare"][1:], strict=True)]
        low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        shown = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})" if name != "bare" else ""
        print(f"| {name} | {statistics.median(spent[1:]):.2f} | {shown} |")


if __name__ == "__main__":
    main()
