"""Mined: sets of experts that are active together, on disk and in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import polars as pl

from moecollab.errors import DataError, SchemaError
from moecollab.manifest import (
    MANIFEST,
    check_manifest,
    dump_json,
    manifest,
    new_folder,
    read_json,
)

KIND, FORMAT = "mined", 1
SETS, HISTOGRAM = "sets.parquet", "histogram.parquet"
HISTOGRAM_COLUMNS = {"count": pl.UInt32, "n_sets": pl.Int64}
Relation: TypeAlias = Literal["same layer", "neighbouring", "distant"]
RELATIONS = ("same layer", "neighbouring", "distant")


def columns(size: int) -> dict[str, pl.DataType]:
    """Columns of a table of sets of this many experts."""
    found: dict[str, pl.DataType] = {}
    for letter in "abcdef"[:size]:
        found |= {f"layer_{letter}": pl.UInt32(), f"expert_{letter}": pl.UInt16()}
    found["count"] = pl.UInt32()
    found |= dict.fromkeys(
        ("support", "expected", "lift", "pmi", "z", "log10_p", "q"), pl.Float64()
    )
    return found | {"relation": pl.Enum(RELATIONS)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Mined:
    """Sets of experts by how often they are active in the same token.

    Made by :func:`moecollab.mine`, read by :func:`moecollab.load_mined`.

    Parameters
    ----------
    table : polars.DataFrame
        A row per set, the best first. Members ``layer_a``, ``expert_a``, ``layer_b`` … in order of
        layer and expert, and

        - ``count``: tokens in which all are active; ``support``: the same as a share of all tokens
        - ``lift``: support over the product of the members' own shares; ``pmi``: its logarithm in
          bits
        - ``expected``: mean count under the null; ``z``: (count - expected) in standard deviations
        - ``log10_p``: decimal logarithm of the probability, under the null, of a count this large
        - ``q``: p adjusted for all sets there are (Benjamini and Hochberg); 0 below 1e-308
        - ``relation``: "same layer" if two members share one; else "neighbouring" if no step from
          one member's MoE layer to the next is longer than one layer; else "distant"

        Where the null cannot change a count, or there is none, ``expected``, ``z``, ``log10_p``
        and ``q`` are null.
    histogram : polars.DataFrame
        How many sets (``n_sets``) have each ``count``, for counts from `least` on; pairs: all.
    size : int
        Members of a set.
    n_rows : int
        Tokens.
    least : int
        Least count of a set in the table.
    layers : tuple of int
        The model's own indices of its MoE layers.
    n_experts : int
        Routed experts per layer.
    settings : mapping
        Settings of the search.
    activations : str or None
        Digest of the activations mined, if there were any.
    """

    table: pl.DataFrame
    histogram: pl.DataFrame
    size: int
    n_rows: int
    least: int
    layers: tuple[int, ...]
    n_experts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    activations: str | None = None

    @property
    def n_sites(self) -> int:
        """Routed experts over all layers."""
        return len(self.layers) * self.n_experts

    @property
    def n_sets(self) -> int:
        """Sets of this size that there are, whether or not they ever occur."""
        return math.comb(self.n_sites, self.size)

    @property
    def n_found(self) -> int:
        """Sets with support of at least the floor."""
        counted = self.histogram.filter(pl.col("count") >= self.least)["n_sets"].sum()
        return int(counted)

    @property
    def complete(self) -> bool:
        """Whether the table holds every set of at least the floor."""
        return self.table.height == self.n_found

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the result as a folder, whole or not at all.

        Parameters
        ----------
        path : path
            Folder to make.
        overwrite : bool
            Whether a folder of that name may be replaced.
        """
        inputs = {} if self.activations is None else {"activations": self.activations}
        about = manifest(KIND, FORMAT, settings=self.settings, inputs=inputs)
        about["model"] = {"layers": list(self.layers), "n_experts": self.n_experts}
        about |= {"size": self.size, "n_rows": self.n_rows, "least": self.least}
        with new_folder(Path(path), overwrite=overwrite) as folder:
            self.table.write_parquet(folder / SETS, compression="zstd")
            self.histogram.write_parquet(folder / HISTOGRAM, compression="zstd")
            (folder / MANIFEST).write_bytes(dump_json(about))

    def __repr__(self) -> str:
        kind = {2: "pairs", 3: "triplets"}.get(self.size, f"sets of {self.size}")
        found = "all" if self.complete else f"the best {self.table.height:,}"
        null, significant = self.settings.get("null"), self.table.filter(pl.col("q") < 0.05).height
        chance = "" if null == "none" else f"{significant:,} above chance at q < 0.05 by {null}; "
        return (
            f"Mined({found} of {self.n_found:,} {kind} with support ≥ {self.least:,} of "
            f"{self.n_rows:,} tokens, of {self.n_sets:,} there are; {chance}"
            f"{_best(self.table, self.size)})"
        )


def _best(table: pl.DataFrame, size: int) -> str:
    if table.is_empty():
        return "nothing found"
    row = table.row(0, named=True)
    names = [f"{row[f'layer_{letter}']}.{row[f'expert_{letter}']}" for letter in "abcdef"[:size]]
    return f"first {' + '.join(names)} in {row['support']:.2%}, lift {row['lift']:.2f}"


def load_mined(path: str | PathLike[str]) -> Mined:
    """Reads what :meth:`Mined.save` wrote, after checking that it is whole.

    Raises
    ------
    DataError
        When a file is missing, truncated or damaged.
    SchemaError
        When the folder is of another kind or version, or a table has other columns.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no mined sets (no {MANIFEST}); make them with mine")
    about = read_json(folder / MANIFEST)
    check_manifest(about, KIND, FORMAT, folder)
    try:
        size = int(about["size"])
        return Mined(
            table=_read(folder / SETS, columns(size)),
            histogram=_read(folder / HISTOGRAM, HISTOGRAM_COLUMNS),
            size=size,
            n_rows=int(about["n_rows"]),
            least=int(about["least"]),
            layers=tuple(int(layer) for layer in about["model"]["layers"]),
            n_experts=int(about["model"]["n_experts"]),
            settings=about["settings"],
            activations=about["inputs"].get("activations"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        if isinstance(cause, DataError):
            raise
        raise SchemaError(f"{folder / MANIFEST} lacks {cause}; mine again") from cause


def _read(path: Path, expected: Mapping[str, Any]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as cause:
        raise DataError(f"{path} is missing, truncated or damaged; mine again") from cause
    if dict(table.schema) != dict(expected):
        wanted = ", ".join(f"{name} {dtype}" for name, dtype in expected.items())
        raise SchemaError(f"{path} has other columns than expected: {wanted}; mine again")
    return table
