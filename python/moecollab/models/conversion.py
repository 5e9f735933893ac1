"""From the tensors of a checkpoint to those of a module, by the rules of transformers.

Names and shapes on disk are often older than the code: experts one by one, other prefixes. The
rules are applied by transformers' own loader, on a few tensors at a time. That loader is internal
to transformers; this is the only place that calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.checkpoint import Checkpoint

_LESS = "free some, or ask for a smaller context, batch_size or hidden_gb"
_NOWHERE = "no.such.module"
_AT_ONCE = 64 << 20  # bytes of small tensors that are converted in one call


@dataclass(frozen=True)
class Part:
    """Tensors that are made together from some tensors on disk.

    Parameters
    ----------
    targets : tuple of str
        Names in the module.
    keys : tuple of str
        Names in the checkpoint.
    n_bytes : int
        Size in memory.
    converted : bool
        Whether they are put together from others, which takes their size once more.
    """

    targets: tuple[str, ...]
    keys: tuple[str, ...]
    n_bytes: int
    converted: bool


class Converter:
    """Reads tensors of a checkpoint into a skeleton.

    Parameters
    ----------
    model : PreTrainedModel
        The skeleton, on the meta device.
    checkpoint : Checkpoint
        Where the weights are.
    device : device
        Where they go.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:  # noqa: ANN401
        self.model = model
        self.checkpoint = checkpoint
        loader = _loader()
        self._convert, self._rename = loader.convert, loader.rename
        with _expected():
            rules = loader.rules(model)
            self._settings = loader.Settings(
                # Without threads, which would read all at once and take memory of their own; where
                # anything goes to disk the loader has none.
                device_map={"": device, _NOWHERE: "disk"},
                dtype=model.dtype,
                dtype_plan=model._get_dtype_plan(model.dtype),
                weight_mapping=rules,
            )
        self._renamings = [one for one in rules if isinstance(one, loader.Renaming)]
        self._converters = [one for one in rules if isinstance(one, loader.Converting)]

    def parts(self) -> list[Part]:
        """What is made of what, for all tensors of the checkpoint that the model has."""
        shapes = self.model.state_dict()
        found: dict[str, tuple[str | None, list[str]]] = {}
        for key in self.checkpoint.tensors:
            target, pattern = self.target(key, shapes)
            if target in shapes:
                found.setdefault(target, (pattern, []))[1].append(key)
        return [
            self._part(target, pattern, keys, shapes) for target, (pattern, keys) in found.items()
        ]

    def target(self, key: str, shapes: dict[str, Any]) -> tuple[str, str | None]:
        """First name in the model that a key goes to, and the pattern that puts it there."""
        prefix = self.model.base_model_prefix
        with _expected():
            found = self._rename(key, self._renamings, self._converters, prefix, shapes)
            if found[0] not in shapes and key in shapes:
                found = self._rename(key, [], [], prefix, shapes)
        name, pattern = found
        return str(name), pattern

    def _part(self, target: str, pattern: str | None, keys: list[str], shapes: Any) -> Part:  # noqa: ANN401
        targets = [target]
        for one in self._converters:
            if pattern is not None and pattern in one.source_patterns:
                patterns = one.target_patterns
                targets = [target.replace(patterns[0], other) for other in patterns]
                break
        size = sum(shapes[name].nbytes for name in targets if name in shapes)
        return Part(tuple(targets), tuple(keys), size, pattern is not None)

    def load(self, parts: Sequence[Part]) -> None:
        """Reads some parts into the model.

        Raises
        ------
        DataError
            When tensors on disk do not fit the model.
        """
        for group in _groups(parts):
            keys = [key for part in group for key in part.keys]
            with self.checkpoint.unread(keys) as tensors, _expected():
                report, _ = self._convert(self.model, tensors, self._settings)
            _check(self.checkpoint.path, report)


def peak_bytes(parts: Sequence[Part]) -> int:
    """Most memory that loading some parts takes, them included."""
    held = peak = 0
    for part in order(parts):
        held += part.n_bytes
        peak = max(peak, held + part.n_bytes * part.converted)
    return peak


def order(parts: Sequence[Part]) -> list[Part]:
    """Parts in the order in which they are loaded: the ones that need most room first."""
    return sorted(parts, key=lambda part: (-part.n_bytes * (1 + part.converted), part.targets))


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Runs of small parts, and large ones alone."""
    group: list[Part] = []
    size = 0
    for part in order(parts):
        if group and size + part.n_bytes > _AT_ONCE:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.n_bytes
    if group:
        yield group


def _check(path: str, report: Any) -> None:  # noqa: ANN401 (transformers is untyped)
    """Raises the first of the loader's complaints."""
    for name, on_disk, expected in sorted(report.mismatched_keys, key=str):
        raise DataError(
            f"the weight {name} in {path} makes the shape {tuple(on_disk)} where the model has "
            f"{tuple(expected)}; the checkpoint is incomplete or its config.json is another "
            "model's: download or save it again"
        )
    for name, reason in sorted(report.conversion_errors.items()):
        lines = str(reason).strip().splitlines()
        told = next((line for line in lines if "Error: " in line), lines[-1]).strip()
        if "alloc" in told or "MemoryError" in told:
            raise DataError(f"there is too little memory for the weight {name}; {_LESS}")
        raise DataError(
            f"the weight {name} cannot be put together from {path} ({told}); the checkpoint is "
            "incomplete: download or save it again"
        )


def _loader() -> Any:  # noqa: ANN401
    """What this module calls of the installed transformers."""
    with _expected():
        from transformers import conversion_mapping, core_model_loading, modeling_utils

        return SimpleNamespace(
            convert=core_model_loading.convert_and_load_state_dict_in_model,
            rename=core_model_loading.rename_source_key,
            Converting=core_model_loading.WeightConverter,
            Renaming=core_model_loading.WeightRenaming,
            rules=conversion_mapping.get_model_conversion_mapping,
            Settings=modeling_utils.LoadStateDictConfig,
        )


@contextmanager
def _expected() -> Iterator[None]:
    """Turns signs of another transformers into one sentence."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as cause:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} loads weights in another way than this "
            f"version of moecollab knows ({cause}); record without layer_by_layer"
        ) from cause
