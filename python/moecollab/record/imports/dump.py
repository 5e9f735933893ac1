"""What every reader of foreign routing yields, and what it may be told."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError, ShapeError
from moecollab.record.tallies import Tallies

MAX_EXPERTS = 65_536  # ids are stored as uint16
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy's and torch's readers raise on damaged files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user says where the files do not.

    Parameters
    ----------
    experts : int or None
        Routed experts per layer, in [1, 65536].
    top_k : int or None
        Experts per token and layer.
    layers : tuple of int or None
        The model's own indices of the layers in the files, ascending.
    domain : str or None
        Domain of all samples, instead of the files' own.
    prefill_only : bool
        Whether generated tokens are left out.
    """

    experts: int | None = None
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    domain: str | None = None
    prefill_only: bool = False

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.experts is not None and not 1 <= self.experts <= MAX_EXPERTS:
            raise SettingsError("experts", self.experts, f"in [1, {MAX_EXPERTS}]")
        if self.top_k is not None and self.top_k < 1:
            raise SettingsError("top_k", self.top_k, "1 or more")
        layers = self.layers
        if layers is not None and (not layers or list(layers) != sorted({*layers} - {-1})):
            raise SettingsError("layers", layers, "ascending indices from 0 on, such as 1,2,3")
        if layers is not None and layers[0] < 0:
            raise SettingsError("layers", layers, "indices of at least 0")
        if self.domain is not None and not self.domain.strip():
            raise SettingsError("domain", self.domain, "a name")


@dataclass
class Findings:
    """What was found in the files and kept out or flagged, counted by rule."""

    missing_tokens: int = 0
    """Tokens without routing in some MoE layer (-1 in all its slots); left out."""
    zero_tokens: int = 0
    """Tokens with expert 0 in every slot of every layer, which no router gives; left out."""
    warm_up_tokens: int = 0
    """Tokens whose weights are all equal while those of others are not; left out."""
    generated_tokens: int = 0
    """Generated tokens that were not asked for; left out."""
    unused_slots: int = 0
    """Slots with id -1 or weight 0 in tokens that are kept; stored as unused."""
    rounded_weights: int = 0
    """Weights written as 0 because of rounding; stored as 2**-24, so that the slot counts."""
    uniform_weights: int = 0
    """Tokens whose weights are equal where that holds for all tokens; kept."""
    dense_layers: int = 0
    """Layers with -1 or 0 in every slot of every token; left out."""
    last_token_absent: int = 0
    """Samples whose last token was never run through the model; kept without it."""
    samples_without_routing: int = 0
    """Samples that hold no routing at all; left out."""
    shared_prompts: int = 0
    """Further answers to a prompt, whose prompt rows are taken once."""
    duplicate_files: int = 0
    """Files with the same routing as one before, such as ranks that see all tokens; left out."""
    other_passes: int = 0
    """Passes or layers that are neither prefill nor decoding of the model; left out."""
    uneven_layers: int = 0
    """Layers whose counts do not add up to tokens times top_k; kept."""

    def counted(self) -> dict[str, int]:
        """The rules that were met, with their counts."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}

    def __str__(self) -> str:
        found = self.counted()
        texts = [f"{name.replace('_', ' ')} {count}" for name, count in found.items()]
        return ", ".join(texts) or "nothing unusual"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The routing of one sample, or of a run of its tokens.

    Parameters
    ----------
    where : str
        File and place in it, for messages.
    file : str
        The file alone.
    domain : str
        Domain of the sample.
    ids : integer array of shape (n_tokens, n_layers, n_slots)
        Expert ids; -1 is none.
    weights : float32 array of the shape of ids, or None
        Coefficients of the experts' outputs, if they were recorded.
    token_ids : uint32 array of shape (n_tokens,), or None
        Ids of the tokens, if they were recorded.
    positions : uint32 array of shape (n_tokens,), or None
        Positions in the sample; 0, 1, 2 … if None.
    generated : bool array of shape (n_tokens,), or None
        Whether the model wrote the token; None where the file does not say.
    """

    where: str
    file: str
    domain: str
    ids: NDArray[Any]
    weights: NDArray[np.float32] | None = None
    token_ids: NDArray[np.uint32] | None = None
    positions: NDArray[np.uint32] | None = None
    generated: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Checks that the arrays belong together."""
        if self.ids.ndim != 3 or self.ids.dtype.kind not in "iu" or 0 in self.ids.shape[1:]:
            raise ShapeError(
                f"{self.where} holds {self.ids.dtype} ids of shape {self.ids.shape}, expected "
                "whole numbers of shape (tokens, layers, top_k); record it again"
            )
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ShapeError(
                f"{self.where} has weights of shape {self.weights.shape} for ids of shape "
                f"{self.ids.shape}; record it again"
            )
        for name in ("token_ids", "positions", "generated"):
            array = getattr(self, name)
            if array is not None and array.shape != (len(self.ids),):
                raise ShapeError(
                    f"{self.where} has {len(array)} {name.replace('_', ' ')} for {len(self.ids)} "
                    "rows of routing; record it again"
                )


@dataclass(frozen=True, kw_only=True)
class Dump:
    """Everything that some files say about single tokens."""

    pieces: Sequence[Piece]
    layers: tuple[int, ...] | None = None
    """The model's own indices of the layers, where the files say."""
    n_experts: int | None = None
    """Routed experts per layer, where the files say."""
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True, kw_only=True)
class CountDump:
    """Sums that some files hold, without single tokens.

    Parameters
    ----------
    tallies : Tallies
        Sums by domain, layer and expert; NaN in what was not recorded.
    layers : tuple of int
        The model's own indices of the layers.
    n_tokens : int or None
        Tokens that were counted, where the files say.
    recorded : tuple of str
        Names of the sums that were recorded.
    """

    tallies: Tallies
    layers: tuple[int, ...]
    n_tokens: int | None
    recorded: tuple[str, ...]
    findings: Findings = field(default_factory=Findings)


def whole_numbers(value: object, where: str) -> NDArray[Any]:
    """A nested list of whole numbers as an array; anything else is a DataError."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as cause:
        raise DataError(f"{where} holds rows of different lengths; record it again") from cause
    if array.dtype.kind not in "iu" and array.size:
        raise DataError(f"{where} holds {array.dtype} where whole numbers belong; record it again")
    return array


def uint32s(value: object, where: str) -> NDArray[np.uint32]:
    """Token ids or positions; negative or huge ones are a DataError."""
    array = whole_numbers(value, where)
    if array.ndim != 1 or (array.size and not 0 <= array.min() <= array.max() < 2**32):
        raise DataError(f"{where} holds numbers that are not a list of uint32; record it again")
    return array.astype(np.uint32)


def read_bytes(path: Path) -> bytes:
    """A file's bytes; an empty file is a DataError."""
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path} is empty; record the routing again")
    return data
