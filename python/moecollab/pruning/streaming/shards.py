"""The files of the smaller checkpoint: what goes into which, and their index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moecollab.errors import SettingsError
from moecollab.models.headers import in_order, write_header
from moecollab.pruning.streaming.pieces import Piece

INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """One file.

    Parameters
    ----------
    name : str
        Its name.
    header : bytes
        Its length and header.
    pieces : tuple of Piece
        Its tensors, in the order in which they are written.
    """

    name: str
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(piece.n_bytes for piece in self.pieces)


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "5GB" or "512MiB".

    Raises
    ------
    SettingsError
        When it is no size above 0.
    """
    found = _SIZE.fullmatch(str(text).strip())
    unit = found[2].lower() if found else ""
    factor = _UNITS[unit] if not (found and found[3]) else 1024 ** list(_UNITS).index(unit)
    size = int(float(found[1]) * factor) if found else 0
    if size < 1:
        raise SettingsError("shard_size", text, 'a size above 0 such as "5GB" or "512MiB"')
    return size


def lay_out(pieces: Sequence[Piece], size: int, metadata: Mapping[str, str]) -> list[Shard]:
    """Files of at most `size` bytes of tensors each, but for larger single tensors.

    Tensors stay together as they are in the old files, which so are read once and in order.
    """
    groups: list[list[Piece]] = []
    filled = 0
    for piece in sorted(pieces, key=lambda one: (str(one.stored.file), one.stored.start)):
        if not groups or filled + piece.n_bytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.n_bytes
    names = _names(len(groups))
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard(name: str, group: Sequence[Piece], metadata: Mapping[str, str]) -> Shard:
    by_name = {piece.name: piece for piece in group}
    order = in_order((piece.name, piece.stored.dtype) for piece in group)
    pieces = tuple(by_name[one] for one in order)
    described = ((piece.name, piece.stored.dtype, piece.shape) for piece in pieces)
    return Shard(name, write_header(described, metadata), pieces)


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The index of some files, as transformers reads it."""
    places = {piece.name: shard.name for shard in shards for piece in shard.pieces}
    total = sum(piece.n_bytes for shard in shards for piece in shard.pieces)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
