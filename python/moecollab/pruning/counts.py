"""Where a configuration says how many experts there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from moecollab.models.routing import MoeLayer, text_config
from moecollab.models.uneven import ENTRY

FURTHER = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
"""Names of the number of layers that predict further tokens."""


def further_counts(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Places of a configuration where layers that predict further tokens (MTP) are counted."""
    for name, below in value.items():
        if isinstance(below, dict):
            yield from further_counts(below, (*path, name))
        elif name in FURTHER and isinstance(below, int) and below > 0:
            yield (*path, name)


def count_field(model: nn.Module, layer: MoeLayer) -> tuple[Any, str]:
    """Configuration object and field with the number of experts."""
    owner: Any = text_config(model)
    *path, name = layer.layout.count.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def set_count(
    model: nn.Module, layer: MoeLayer, count: int, entry: Mapping[str, Any] | None = None
) -> None:
    """Writes how many experts there are into a model's configuration.

    `entry` says the numbers of layers that differ; without it, what an earlier cut said goes.
    """
    owner, name = count_field(model, layer)
    setattr(owner, name, count)
    config: Any = vars(model)["config"]
    vars(config).pop(ENTRY, None)
    for key, value in (entry or {}).items():
        setattr(config, key, value)


def count_names(model: nn.Module, layer: MoeLayer) -> list[str]:
    """All names under which some version of transformers reads the number of experts.

    The name in ``config.json`` has changed between versions, and an older one that misses its name
    silently takes its default.
    """
    owner, name = count_field(model, layer)
    aliases = getattr(type(owner), "attribute_map", {})
    target = aliases.get(name, name)
    return sorted({name, target, *(alias for alias, to in aliases.items() if to == target)})


def holder_of(config: Any, names: list[str]) -> tuple[str, ...] | None:  # noqa: ANN401
    """Path of the object in a configuration, at the top or below, that has one of the names."""
    if not isinstance(config, dict):
        return None
    if any(name in config for name in names):
        return ()
    for key, value in config.items():
        below = holder_of(value, names)
        if below is not None:
            return (key, *below)
    return None


def text_path(config: Any) -> tuple[str, ...]:  # noqa: ANN401 (transformers is untyped)
    """Fields that lead from a configuration to that of its text part."""
    text = config.get_text_config()
    return () if text is config else _path_to(config, text) or ()


def _path_to(config: Any, wanted: Any) -> tuple[str, ...] | None:  # noqa: ANN401
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is wanted:
            return (name,)
        below = None if part is None else _path_to(part, wanted)
        if below is not None:
            return (name, *below)
    return None
