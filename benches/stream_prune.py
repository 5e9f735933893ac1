"""Pruning a folder of safetensors beside cp of as many bytes, and the memory it takes.

    python benches/stream_prune.py FOLDER                  # experts apart, then fused
    python benches/stream_prune.py FOLDER --layout fused --rounds 5

Makes a checkpoint of random bytes in a real layout (Qwen3-MoE with 128 experts apart, gpt-oss with
32 fused), drops every other expert, and copies with cp as many bytes of the same files. Both start
with the files out of the page cache and end when the disk has all. Needs 14 GB, of which nothing
is left. Prints Markdown.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

SHARD = 1 << 30
BLOCK = 64 << 20
SHAPES = {
    "apart": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
    "fused": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 201088,
    },
}


def tensors_of(config):
    """Name and shape of every tensor on disk."""
    from moecollab.models.loading import skeleton

    for name, value in skeleton(config).state_dict().items():
        shape = tuple(value.shape)
        if config.model_type != "qwen3_moe" or ".experts." not in name:
            yield name, shape
            continue
        stem, _, last = name.rpartition(".")
        halves = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert in range(shape[0]):
            for half in halves:
                yield f"{stem}.{expert}.{half}.weight", (shape[1] // len(halves), shape[2])


def make(folder: Path, layout: str) -> None:
    """A checkpoint of random bytes; routers are finite."""
    import json

    import torch
    from transformers import AutoConfig

    from moecollab.models.headers import write_header

    settings = dict(SHAPES[layout])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="bfloat16")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    groups, filled = [[]], 0
    for name, shape in tensors_of(config):
        size = 2 * torch.Size(shape).numel()
        if filled and filled + size > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append((name, torch.bfloat16, shape))
        filled += size
    noise = os.urandom(BLOCK)
    places = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / file).open("wb") as opened:
            opened.write(write_header(group, {"format": "pt"}))
            for name, dtype, shape in group:
                places[name] = file
                left = dtype.itemsize * torch.Size(shape).numel()
                finite = ".gate." in name or ".router." in name
                while left:
                    opened.write(bytes(left) if finite else noise[:left])
                    left -= left if finite else min(left, BLOCK)
            opened.flush()
            os.fsync(opened.fileno())
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sync(folder: Path) -> None:
    """Waits until the disk has a folder's files."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def memory(field: str) -> float:
    """MB of this process: most that was resident (VmHWM), or what no file backs now (RssAnon)."""
    # Not ru_maxrss, which a child takes over from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@contextmanager
def most_anonymous():
    """A list of what no file backs, longer by one every 10 ms; the kernel keeps no peak of it."""
    found, done = [], threading.Event()

    def watch():
        while not done.wait(0.01):
            found.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found
    done.set()
    watcher.join()


def child(base: Path, out: Path) -> None:
    """Prunes in this process; prints seconds, CPU seconds and the MB of the table's columns."""
    bare, bare_anonymous = memory("VmHWM"), memory("RssAnon")
    import moecollab as mc
    from moecollab.models.keep import Keep
    from moecollab.models.loading import open_config, skeleton
    from moecollab.models.routing import find_moe_layers

    layers = find_moe_layers(skeleton(open_config(str(base), moe=True)))
    count = layers[0].n_experts
    keep = Keep({one.layer: tuple(range(0, count, 2)) for one in layers}, count, layers[0].top_k)
    mc.prune  # noqa: B018 (imports it)
    imported = memory("VmHWM")
    with most_anonymous() as anonymous:
        began, used = time.perf_counter(), time.process_time()
        mc.prune(base, keep, out=out)
        took, cpu = time.perf_counter() - began, time.process_time() - used
    peak = memory("VmHWM")
    print(took, cpu, peak - imported, peak - bare, max(anonymous) - bare_anonymous)


def prune(base: Path, out: Path) -> list[float]:
    """Seconds, CPU seconds and MB of a pruning in a process of its own."""
    forget(base)
    command = [sys.executable, __file__, str(base), "--child", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(one) for one in done.stdout.split()]


def copy(base: Path, out: Path, n_bytes: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of cp of whole files that are about as many bytes."""
    chosen, total = [], 0
    for file in sorted(base.glob("*.safetensors")):
        if total < n_bytes:
            chosen.append(file)
            total += file.stat().st_size
    out.mkdir()
    forget(base)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, chosen), str(out)], check=True)
    sync(out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, total


def measure(folder: Path, layout: str, rounds: int) -> None:
    """Prints one row."""
    base, out = folder / "base", folder / "out"
    if not base.exists():  # of a run that was stopped
        make(base, layout)
    found = []
    for _ in range(rounds):
        took, cpu, *above = prune(base, out)
        kept = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        cp_took, cp_cpu, copied = copy(base, out, kept)
        shutil.rmtree(out)
        share = (kept / took) / (copied / cp_took)
        row = (kept / took / 1e6, copied / cp_took / 1e6, share, cpu, cp_cpu, *above)
        print("  ".join(f"{one:.2f}" for one in row), file=sys.stderr, flush=True)
        found.append(row)
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    shutil.rmtree(base)
    speed, cp_speed, share, cpu, cp_cpu, *above = zip(*found, strict=True)
    cells = [layout, f"{total / 1e9:.2f}", f"{kept / 1e9:.2f}"]
    cells += [spread(speed, 0), spread(cp_speed, 0), spread(share, 2)]
    cells += [spread(cpu, 1), spread(cp_cpu, 1), *(f"{max(one):.0f}" for one in above)]
    print(f"| {' | '.join(cells)} |")


def spread(values: tuple[float, ...], digits: int) -> str:
    """Median, least and most."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Measures one layout or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.folder, options.child)
        return
    columns = "GB | kept GB | prune MB/s | cp MB/s | share of cp's speed | prune CPU s | cp CPU s"
    above = "MB above imports | MB above the interpreter | of these without a file"
    print(f"| experts | {columns} | {above} |")
    print("| --- " + "| ---: " * 10 + "|")
    for layout in SHAPES if options.layout is None else [options.layout]:
        measure(options.folder / layout, layout, options.rounds)
        (options.folder / layout).rmdir()


if __name__ == "__main__":
    main()
