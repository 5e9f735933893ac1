"""What the tensors of a checkpoint are in the module, scales and packed weights too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.conversion import Converter
from moecollab.models.routing import MoeLayer
from moecollab.models.slicing import router_rows


@dataclass(frozen=True)
class Part:
    """What a tensor of the module is: rows of a layer's router, or of its experts."""

    layer: MoeLayer
    router: bool


def routed_parts(layers: Sequence[MoeLayer], shapes: Mapping[str, Any]) -> dict[str, Part]:
    """Tensors of the module that are cut when experts go, by name."""
    found: dict[str, Part] = {}
    for layer in layers:
        held = {id(value) for _, _, value in router_rows(layer)}
        rows = [f"{layer.name}.{path}" for path in layer.layout.rows] if held else []
        inside = f"{layer.name}.{layer.layout.experts}."
        if isinstance(layer.experts, torch.nn.ModuleList):
            experts = [name for name in shapes if name.startswith(inside)]
        else:
            experts = [inside + path for path in layer.layout.tensors]
        found |= {name: Part(layer, router=True) for name in rows if name in shapes}
        found |= {name: Part(layer, router=False) for name in experts if name in shapes}
    return found


def targets_of(model: Any, checkpoint: Checkpoint, shapes: dict[str, Any]) -> dict[str, str]:  # noqa: ANN401
    """The tensor of the module that each tensor on disk is for, or belongs to as a scale does."""
    converter = Converter(model, checkpoint, torch.device("cpu"))
    found: dict[str, str] = {}
    for key in checkpoint.tensors:
        target, _ = converter.target(key, shapes)
        if target in shapes:
            found[key] = target
    for key in checkpoint.tensors:
        if key not in found:
            bases = (converter.target(base, shapes)[0] for base in _bases(key))
            owner = next((name for name in bases if name in shapes), None)
            if owner is not None:
                found[key] = owner
    return found


def _bases(key: str) -> Iterator[str]:
    """Names that the weight may have that a scale or a packed part belongs to."""
    path, _, last = key.rpartition(".")
    while "_" in last:
        last = last.rpartition("_")[0]
        yield f"{path}.{last}"
    yield f"{path}.weight"
    while "." in path:
        yield path
        path = path.rpartition(".")[0]


def check_untied(model: Any, parts: Mapping[str, Part]) -> None:  # noqa: ANN401
    """Refuses routers and experts that are the same tensor as another.

    Raises
    ------
    UnsupportedModelError
        When two layers share a tensor that would be cut in each of them in another way.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in tied.items():
        if one in parts or other in parts:
            raise UnsupportedModelError(
                f"{one} and {other} are one tensor, which cannot be cut for each of them; mask the "
                "model instead"
            )


def check_complete(
    model: Any,  # noqa: ANN401
    checkpoint: Checkpoint,
    parts: Mapping[str, Part],
    targets: Mapping[str, str],
) -> None:
    """Refuses a checkpoint in which a router or an expert has no tensor.

    Raises
    ------
    DataError
        Naming the tensor.
    """
    converter = Converter(model, checkpoint, torch.device("cpu"))
    held = {name for part in converter.parts() for name in part.targets} | set(targets.values())
    for name in parts:
        if name not in held:
            raise DataError(
                f"{checkpoint.path} lacks the weight {name}; the checkpoint is incomplete: "
                "download or save it again"
            )
