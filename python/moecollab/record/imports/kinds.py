"""The kinds of files that can be imported, each by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from moecollab.errors import unknown_name
from moecollab.record.imports import (
    esft,
    llamacpp,
    megatron,
    plain,
    reap,
    sglang,
    sglang_response,
    vllm,
)
from moecollab.record.imports.dump import CountDump, Dump, Options

Reader: TypeAlias = Callable[[Sequence[Path], Options], Dump | CountDump]

READERS: dict[str, Reader] = {
    "esft": esft.read_esft,
    "llamacpp": llamacpp.read_llamacpp,
    "megatron": megatron.read_megatron,
    "npz": plain.read_npz,
    "parquet": plain.read_parquet,
    "reap": reap.read_reap,
    "sglang": sglang.read_sglang,
    "sglang-response": sglang_response.read_sglang_response,
    "vllm": vllm.read_vllm,
}


SUFFIXES: dict[str, tuple[str, ...]] = {
    "esft": (".txt",),
    "llamacpp": (".csv", ".json", ".jsonl"),
    "megatron": (".jsonl",),
    "npz": (".npy", ".npz"),
    "parquet": (".parquet",),
    "reap": (".pt",),
    "sglang": (".pt",),
    "sglang-response": (".json", ".jsonl"),
    "vllm": (".json", ".jsonl"),
}
"""How a kind's files in a folder end; a file given by name may end otherwise."""


def reader(kind: str) -> Reader:
    """The reader of a kind; an unknown name is answered with near ones."""
    if kind not in READERS:
        raise unknown_name("kind", kind, tuple(READERS))
    return READERS[kind]
