"""Files beside the weights that go along to the smaller checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from moecollab.errors import DataError
from moecollab.manifest import MANIFEST, write_bytes, write_json
from moecollab.models.checkpoint import file_inside
from moecollab.models.masked import MASK_FILE
from moecollab.pruning.card import CARD, base_name
from moecollab.pruning.streaming.shards import INDEX

CONFIG = "config.json"
_TEMPLATES = "additional_chat_templates"
_REPLACED = (CONFIG, MANIFEST, MASK_FILE)
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml"),
    *(".onnx", ".onnx_data", ".npz", ".npy", ".zip", ".tar", ".gz", ".index.json"),
)
"""Ends of names of what holds weights, or says where they are."""


def kept_files(source: Path) -> list[str]:
    """Names of files that hold for the smaller model too: tokenizer, templates, code, licence.

    Raises
    ------
    DataError
        When one is a link that leads out of the folder.
    """
    found = [*_files(source, ""), *_files(source / _TEMPLATES, f"{_TEMPLATES}/")]
    return [name for name in found if file_inside(source, name) is not None]


def _files(folder: Path, prefix: str) -> Iterator[str]:
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        hidden = file.name.startswith(".") or file.name in _REPLACED
        if file.is_file() and not hidden and not file.name.endswith(_WEIGHTS):
            yield prefix + file.name


def write_beside(
    source: Path, target: Path, *, texts: Mapping[str, str], index: dict[str, object] | None
) -> None:
    """Writes all files of a checkpoint but its weights.

    Raises
    ------
    DataError
        When a file can no longer be read.
    """
    for name in kept_files(source):
        place = target / (base_name(name) if CARD in texts else name)
        place.parent.mkdir(exist_ok=True)
        found = file_inside(source, name)
        if found is None:
            raise DataError(f"{source / name} has gone while it was copied; run the same again")
        shutil.copyfile(found, place)
    for name, text in texts.items():
        write_bytes(target / name, text.encode(), overwrite=True)
    if index is not None:
        write_json(target / INDEX, index, overwrite=True)
