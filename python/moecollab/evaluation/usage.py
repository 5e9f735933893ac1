"""What running a model takes: tokens per second, and bytes in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from moecollab.errors import DataError
from moecollab.evaluation.generation import only_greedy
from moecollab.manifest import read_json
from moecollab.progress import track

PROMPT, NEW, ROUNDS, WARM_UP = 128, 32, 5, 1
"""Tokens read and written in one round, rounds that count, and rounds before them."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Speed and size of a model as it ran on one machine.

    Parameters
    ----------
    batch : int
        Sequences at once.
    prompt_tokens, new_tokens : int
        Tokens that each sequence has, and that are written after it.
    threads : int
        Threads of torch.
    device : str
        Kind of device, as torch names it.
    prefill : tuple of float
        Tokens per second while reading, of every round; the first written token is in its time.
    decode : tuple of float
        Tokens per second while writing, of every round, from the second token on.
    parameters : int
        Numbers in the weights. Experts that a mask switches off are among them; their rows of the
        routers are not.
    weight_bytes : int
        Bytes of weights and buffers in memory.
    resident_bytes : int, optional
        Memory of the process after the rounds, or the most that CUDA had allocated in them; all
        else that the process holds is in it.
    disk_bytes : int, optional
        Bytes of the weight files, if the model comes from a folder.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    device: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    parameters: int
    weight_bytes: int
    resident_bytes: int | None
    disk_bytes: int | None

    @property
    def prefill_speed(self) -> float:
        """Tokens read per second: the median of the rounds."""
        return median(self.prefill)

    @property
    def decode_speed(self) -> float:
        """Tokens written per second: the median of the rounds."""
        return median(self.decode)

    def as_json(self) -> dict[str, Any]:
        """The usage as plain data."""
        return asdict(self) | {"prefill": list(self.prefill), "decode": list(self.decode)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Usage:
        """The usage in plain data; DataError when no round is in it."""
        rounds = {name: tuple(map(float, found[name])) for name in ("prefill", "decode")}
        if not all(rounds.values()) or min(map(min, rounds.values())) <= 0:
            raise DataError("rounds of speed are missing or not above 0; evaluate again")
        return cls(**(dict(found) | rounds))


class _Watch(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when each token is out; putting it waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:  # noqa: ARG002 (the prompt or a token)
        self.times.append(perf_counter())

    def end(self) -> None:
        """Has nothing left to do."""


def measure_usage(model: Any, folder: Path | None, *, window: int, seed: int) -> Usage:  # noqa: ANN401
    """Speed of one sequence, in rounds after a warm-up, and the model's size.

    Parameters
    ----------
    model : causal language model
        Left as it was.
    folder : path, optional
        Where its weights were loaded from.
    window : int
        Tokens that the model takes at most, at least 2; 160 are used if it takes them.
    seed : int
        Seed of the tokens read, which are drawn evenly from the vocabulary: text may go to fewer
        experts.

    Raises
    ------
    DataError
        When the model cannot generate, or takes fewer than 3 tokens.
    """
    if not hasattr(model, "generate") or window < 3:
        raise DataError(
            f"the speed of {type(model).__name__} cannot be measured: it must generate and take 3 "
            "tokens; leave speed out"
        )
    new = max(2, min(NEW, window // 5))
    given = _some_tokens(model, min(PROMPT, window - new), seed)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    rounds = _rounds(model, given, new)
    held = {id(one): one for one in (*model.parameters(), *model.buffers())}.values()
    return Usage(
        batch=1,
        prompt_tokens=given.shape[1],
        new_tokens=new,
        threads=torch.get_num_threads(),
        device=model.device.type,
        prefill=tuple(given.shape[1] / first for first, _rest in rounds),
        decode=tuple((new - 1) / rest for _first, rest in rounds),
        parameters=sum(one.numel() for one in {id(p): p for p in model.parameters()}.values()),
        weight_bytes=sum(one.numel() * one.element_size() for one in held),
        resident_bytes=_resident(model.device),
        disk_bytes=_on_disk(folder),
    )


def _some_tokens(model: Any, size: int, seed: int) -> torch.Tensor:  # noqa: ANN401
    """Drawn tokens of one sequence: (1, size)."""
    draw = torch.Generator().manual_seed(seed)
    known = model.get_input_embeddings().weight.shape[0]
    return torch.randint(known, (1, size), generator=draw).to(model.device)


def _rounds(model: Any, given: torch.Tensor, new: int) -> list[tuple[float, float]]:  # noqa: ANN401
    """Seconds to the first token and from there to the last, of every round that counts."""
    found, training = [], model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            only_greedy(model, new, ends=False) as settings,
            track("measuring speed", WARM_UP + ROUNDS) as bar,
        ):
            for _round in range(WARM_UP + ROUNDS):
                watch, start = _Watch(), perf_counter()
                model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    generation_config=settings,
                    streamer=watch,
                )
                _prompt, first, *_others, last = watch.times
                found.append((first - start, last - first))
                bar.advance()
    finally:
        model.train(training)
    return found[WARM_UP:]


def _resident(device: torch.device) -> int | None:
    """Bytes of memory in use, if the system says so."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def _on_disk(folder: Path | None) -> int | None:
    """Bytes of the weight files that transformers reads in a folder, or None if there are none."""
    files = [] if folder is None else _weight_files(folder)
    return sum(file.stat().st_size for file in files) or None


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names; others hold the same weights once more."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return list(folder.glob("*.safetensors"))
    named = {str(name) for name in dict(read_json(index).get("weight_map") or {}).values()}
    return [folder / name for name in sorted(named) if (folder / name).is_file()]
