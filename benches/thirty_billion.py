"""From a 30 B checkpoint to a smaller one, step by step: what each command takes.

    python benches/thirty_billion.py TEXT.jsonl FOLDER                # 6 of the 48 layers
    python benches/thirty_billion.py TEXT.jsonl FOLDER --layers 48    # all: needs 100 GB

Makes a checkpoint in the layout of Qwen3-30B-A3B (128 experts a layer, top 8, each expert's tensors
apart, bfloat16) with random weights and the embedded model's tokenizer, and runs the commands of
docs/pruning.md on it, each as a process of its own. Prints Markdown. Random weights say nothing of
what a cut costs; time, memory and bytes do not depend on them.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

LAYERS, SHARD, BLOCK = 48, 4 << 30, 1 << 25
SHAPE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
}


def make(folder: Path, n_layers: int) -> None:
    """The checkpoint, in a process of its own so that this one stays small."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from moecollab.demo import MODEL
    from moecollab.models.loading import skeleton

    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        "qwen3_moe", **SHAPE, num_hidden_layers=n_layers, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    for file in Path(MODEL).glob("tokenizer*"):
        shutil.copy(file, folder)
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    held, filled, places, number = {}, 0, {}, 0

    def write() -> None:
        nonlocal held, filled, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(held, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held, filled = {}, 0

    for at, (name, shape) in enumerate(_tensors(skeleton(config))):
        size = torch.Size(shape).numel()
        if filled + 2 * size > SHARD:
            write()
        start = at * 7919 % (BLOCK // 2)
        repeats = -(-(start + size) // BLOCK)
        values = noise.repeat(repeats)[start : start + size].reshape(shape).clone()
        held[name] = torch.ones_like(values) if "norm" in name else values
        filled += 2 * size
    write()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(model):
    """Name and shape of every tensor on disk."""
    for name, value in model.state_dict().items():
        if ".experts." not in name:
            yield name, tuple(value.shape)
            continue
        stem, _, last = name.rpartition(".")
        n_experts, wide, other = value.shape
        halves = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert in range(n_experts):
            for half in halves:
                yield f"{stem}.{expert}.{half}.weight", (wide // len(halves), other)


def step(*command: str) -> tuple[float, float, float]:
    """Runs one command; wall and CPU seconds and the largest resident memory in GB."""
    began = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    took = time.perf_counter() - began
    return took, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6


LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
import torch
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
assert "moecollab" not in sys.modules
"""


def steps(base: Path, text: Path, tokens: int) -> dict[str, tuple[str, ...]]:
    """Commands by what they do."""
    run, model = base.parent, str(base)
    acts, scores, plan = run / "acts", run / "scores.parquet", run / "plan.json"
    out = str(run / "pruned")
    commands = {
        "extract": f"{model} {text} --out {acts} --collect coverage --tokens {tokens} "
        "--layer-by-layer",
        "score": f"{acts} --criterion coverage --out {scores}",
        "plan": f"{scores} --drop 0.5 --out {plan}",
        "prune": f"{model} {plan} --out {out} --verify",
    }
    found = {verb: ("moecollab", verb, *rest.split()) for verb, rest in commands.items()}
    return found | {"load": (sys.executable, "-c", LOAD, out)}


def main() -> None:
    """Makes the checkpoint and measures every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = options.folder / "base"
    if options.make:
        make(base, options.layers)
        return
    if not base.exists():
        again = (sys.executable, __file__, str(options.text), str(options.folder), "--make")
        step(*again, "--layers", str(options.layers))
    sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
    print(f"{options.layers} layers, {sum(sizes) / 1e9:.2f} GB, {options.tokens} tokens\n")
    print("| step | wall s | CPU s | largest memory, GB |\n| --- | ---: | ---: | ---: |")
    for name, command in steps(base, options.text, options.tokens).items():
        wall, cpu, memory = step(*command)
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
