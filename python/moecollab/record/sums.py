"""Every sum that a recording can hold, as data: what it is, its shape and how shards are joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import SettingsError, unknown_name

REGISTERS = 1024
"""Bytes of a sketch of the token ids that an expert saw."""

Axis = Literal["", "width", "experts", "registers"]
Join = Literal["add", "max", "peak"]


@dataclass(frozen=True)
class Sum:
    """One array of shape (n_domains, n_layers, n_experts) and, for some, one axis more.

    Parameters
    ----------
    name : str
        Name of the array.
    group : str
        What must be asked for to have it.
    dtype : str
        Of the array.
    axis : {"", "width", "experts", "registers"}
        The last axis: none, channels of the expert's output, experts of the layer, registers.
    join : {"add", "max", "peak"}
        How two recordings become one; "peak" belongs to the larger `max_abs`.
    """

    name: str
    group: str
    dtype: str = "float64"
    axis: Axis = ""
    join: Join = "add"


GROUPS: Mapping[str, str] = {
    "routing": "tokens and weights of every expert; always recorded",
    "norms": "norms and largest entries of expert outputs",
    "shift": "how far the routed experts turn the residual stream (EASY-EP's token term)",
    "channels": "outputs summed channel by channel; 16 bytes per expert and channel",
    "probability": "router probability of every expert, routed to or not",
    "pairs": "how often two experts of a layer are chosen together",
    "preferences": "the most probable experts that were not chosen, a column for every token",
    "vocabulary": "sketch of the token ids that each expert saw; 1 KiB per expert",
}
"""What can be recorded, by name."""

_MEANT: dict[str, tuple[str, ...]] = {}


def stand_for(name: str, groups: tuple[str, ...]) -> None:
    """Lets a name be asked for in place of some groups, as criteria do for what they read."""
    _MEANT[name] = groups


def stand_no_more(name: str) -> None:
    """Forgets such a name."""
    del _MEANT[name]


def groups_meant(asked: Iterable[str]) -> set[str]:
    """The groups that are named, or stood for by a name.

    Raises
    ------
    SettingsError
        When a name is not known.
    """
    found: set[str] = set()
    for name in asked:
        if name not in GROUPS and name not in _MEANT:
            raise unknown_name("collect", name, [*GROUPS, *_MEANT])
        found |= {name} if name in GROUPS else set(_MEANT[name])
    return found


_SUMS = (
    Sum("count", "routing", "int64"),
    Sum("sum_weight", "routing"),
    Sum("sum_weight_sq", "routing"),
    Sum("sum_norm", "norms"),
    Sum("sum_norm_sq", "norms"),
    Sum("sum_weighted_norm", "norms"),
    Sum("sum_weighted_norm_sq", "norms"),
    Sum("max_abs", "norms", join="max"),
    Sum("peak_token", "norms", "int64", join="peak"),
    Sum("peak_position", "norms", "int64", join="peak"),
    Sum("peak_channel", "norms", "int64", join="peak"),
    Sum("sum_shift", "shift"),
    Sum("sum_output", "channels", axis="width"),
    Sum("sum_output_sq", "channels", axis="width"),
    Sum("sum_probability", "probability"),
    Sum("pair_count", "pairs", "int64", "experts"),
    Sum("token_sketch", "vocabulary", "uint8", "registers", "max"),
)
SUMS: Mapping[str, Sum] = {one.name: one for one in _SUMS}
"""All sums by name."""

SCALARS = tuple(
    one.name for one in _SUMS if one.group in ("routing", "norms") and one.join == "add"
)
"""Sums of one number per expert that every recording with norms has."""


def names_of(groups: Iterable[str]) -> tuple[str, ...]:
    """Names of the sums of some groups, in a fixed order.

    Raises
    ------
    SettingsError
        When a group is not known.
    """
    wanted = set(groups)
    for group in sorted(wanted - set(GROUPS)):
        raise SettingsError("collect", group, f"some of {', '.join(GROUPS)}")
    return tuple(one.name for one in _SUMS if one.group in wanted)


def zeros(name: str, shape: tuple[int, int, int], width: int) -> NDArray[Any]:
    """A sum of nothing.

    Parameters
    ----------
    name : str
        Name of the sum.
    shape : tuple of int
        (n_domains, n_layers, n_experts).
    width : int
        Channels of expert outputs.
    """
    kind = SUMS[name]
    sizes = {"": (), "width": (width,), "experts": (shape[-1],), "registers": (REGISTERS,)}
    return np.zeros((*shape, *sizes[kind.axis]), kind.dtype)


def join(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Two recordings as one; of equal peaks the first stays."""
    joined = {name: value.copy() for name, value in first.items()}
    add(joined, second)
    return joined


def add(into: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> None:
    """Adds one recording to another in its place; of equal peaks the first stays."""
    higher = other["max_abs"] > into["max_abs"] if "max_abs" in into else False
    for name, value in other.items():
        rule = SUMS[name].join
        if rule == "peak":
            np.copyto(into[name], value, where=higher)
        else:
            (np.add if rule == "add" else np.maximum)(into[name], value, out=into[name])


def total(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Sums over the first axis; of equal peaks the first stays."""
    found: dict[str, Any] = {}
    for name, value in arrays.items():
        rule = SUMS[name].join
        if rule == "peak":
            where = arrays["max_abs"].argmax(axis=0)[None]
            found[name] = np.take_along_axis(value, where, axis=0)[0]
        else:
            found[name] = value.sum(axis=0) if rule == "add" else value.max(axis=0)
    return found
