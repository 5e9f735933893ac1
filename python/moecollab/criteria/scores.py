"""Scores of all experts by one criterion, and their file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.criteria.spread import ARRAYS, Spread
from moecollab.errors import DataError, SchemaError, ShapeError
from moecollab.manifest import check_manifest, manifest, write_bytes
from moecollab.models.groups import RouterGroups, groups_from_json
from moecollab.models.widths import counts_from_json, present

KIND, FORMAT = "scores", 1
COLUMNS: dict[str, Any] = {
    "layer": pl.UInt32,
    "expert": pl.UInt16,
    "score": pl.Float64,
    "count": pl.Int64,
}

SPREAD_COLUMNS: dict[str, Any] = dict.fromkeys(ARRAYS, pl.Float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """One score per routed expert; higher means keep, ties keep the smaller expert id.

    Parameters
    ----------
    criterion : str
        Name of the criterion that made them.
    values : float64 array of shape (n_layers, n_experts)
        Scores, finite; 0 past the experts of a layer that has fewer than others.
    counts : int64 array of shape (n_layers, n_experts)
        Tokens that were routed to each expert.
    layers : tuple of int
        The model's own index of each row's layer, ascending.
    top_k : int
        Experts that the router selects per token.
    activations : str, optional
        Digest of the activations they were computed from, if there were any.
    settings : mapping
        What else they depend on, such as the seed.
    groups : RouterGroups, optional
        Groups that the routers choose among, of which plans must keep equal numbers.
    spread : Spread, optional
        How far they would vary with other documents; :func:`moecollab.uncertainty` finds it.
    experts_per_layer : tuple of int, optional
        Routed experts of every layer, where layers differ; `n_experts` is the most of one.
    """

    criterion: str
    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    layers: tuple[int, ...]
    top_k: int
    activations: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    groups: RouterGroups | None = None
    spread: Spread | None = field(default=None, repr=False)
    experts_per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks shapes and finiteness, and makes the arrays read-only."""
        self._check_widths()
        for name, dtype in (("values", np.float64), ("counts", np.int64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 2 or len(array) != len(self.layers):
                expected = f"{np.dtype(dtype).name} ({len(self.layers)}, n_experts)"
                raise ShapeError(
                    f"{name} of the scores is {array.dtype} {array.shape}, expected {expected}; "
                    "give one row per layer"
                )
            array = np.ascontiguousarray(array).view()
            if self.experts_per_layer is not None and array[~self.present].any():
                array = np.where(self.present, array, 0)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        self._check_content()
        if self.spread is not None and self.spread.low.shape != self.values.shape:
            raise ShapeError(
                f"the spread has shape {self.spread.low.shape}, but the scores "
                f"{self.values.shape}; resample these scores"
            )

    def _check_widths(self) -> None:
        found, widest = self.experts_per_layer, self.values.shape[-1]
        if found is not None and (len(found) != len(self.layers) or max(found) != widest):
            raise ShapeError(
                f"experts_per_layer of the scores is {list(found)} for {len(self.layers)} layers "
                f"of up to {widest} experts; give one number a layer, or None where all are alike"
            )

    def _check_content(self) -> None:
        if self.counts.shape != self.values.shape or not self.values.size:
            raise ShapeError(
                f"scores have shape {self.values.shape} and counts {self.counts.shape}; "
                "give one of each per expert"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise DataError(f"layers {self.layers} are not ascending; sort the rows by layer")
        if not np.isfinite(self.values).all():
            row, expert = np.argwhere(~np.isfinite(self.values))[0]
            raise DataError(
                f"the {self.criterion} score of layer {self.layers[row]} expert {expert} is "
                f"{self.values[row, expert]}; scores must be finite, so repair the criterion"
            )

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.layers)

    @property
    def n_experts(self) -> int:
        """Number of routed experts per layer; the most that one has where layers differ."""
        return int(self.values.shape[1])

    @property
    def counts_of_experts(self) -> tuple[int, ...]:
        """Number of routed experts of every layer."""
        return self.experts_per_layer or (self.n_experts,) * self.n_layers

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which sites are experts: bool array of shape (n_layers, n_experts)."""
        return present(self.counts_of_experts, self.n_experts)

    @property
    def n_sites(self) -> int:
        """Number of routed experts over all layers."""
        return sum(self.counts_of_experts)

    @property
    def unrouted(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of those that no recorded token went to; none where nothing was recorded.

        Their scores say what they would be worth to this text, which is nothing, and are defined by
        each criterion; another text may use them.
        """
        if not self.counts.any():
            return ()
        where = np.argwhere((self.counts == 0) & self.present).tolist()
        return tuple((self.layers[row], expert) for row, expert in where)

    def table(self) -> pl.DataFrame:
        """One row per expert: layer, expert, score, count and, if known, their spread."""
        held = self.present
        row, expert = np.nonzero(held)
        columns = {
            "layer": np.asarray(self.layers)[row],
            "expert": expert,
            "score": self.values[held],
            "count": self.counts[held],
        }
        if self.spread is None:
            return pl.DataFrame(columns, schema=COLUMNS)
        more = {name: value[held] for name, value in self.spread.arrays().items()}
        return pl.DataFrame(columns | more, schema=COLUMNS | SPREAD_COLUMNS)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the table as Parquet, with all else in the file's metadata."""
        inputs = {} if self.activations is None else {"activations": self.activations}
        about = manifest(KIND, FORMAT, settings=self.settings, inputs=inputs)
        about |= {"criterion": self.criterion, "top_k": self.top_k}
        if self.experts_per_layer is not None:
            about["experts_per_layer"] = list(self.experts_per_layer)
        if self.groups is not None:
            about["router_groups"] = self.groups.as_json()
        if self.spread is not None:
            about["spread"] = self.spread.about()
        buffer = io.BytesIO()
        self.table().write_parquet(buffer, metadata={"moecollab": json.dumps(about)})
        write_bytes(Path(path), buffer.getvalue(), overwrite=overwrite)

    def __repr__(self) -> str:
        n_unrouted = len(self.unrouted)
        noted = f"; {n_unrouted} never routed" if n_unrouted else ""
        if self.spread is not None:
            noted += f"; resamples keep {100 * self.spread.stability:.0f} % the same"
        return (
            f"Scores({self.criterion}: {self.n_layers} layers × {self.n_experts} experts, "
            f"{self.values.min():.4g} to {self.values.max():.4g}{noted})"
        )


def load_scores(path: str | PathLike[str]) -> Scores:
    """Scores read from a file that :meth:`Scores.save` wrote.

    Raises
    ------
    SchemaError
        When the file is something else.
    DataError
        When it is missing or damaged.
    """
    file = Path(path)
    table, about = _read(file)
    check_manifest(about, KIND, FORMAT, file)
    layers = tuple(int(layer) for layer in table["layer"].unique().sort())
    try:
        counts = counts_from_json(about.get("experts_per_layer"), len(layers))
        most = table.height // max(1, len(layers)) if counts is None else max(counts)
        held = present(counts or (most,) * len(layers), most)
        scores = Scores(
            criterion=str(about["criterion"]),
            values=_dense(table["score"], held),
            counts=_dense(table["count"], held),
            layers=layers,
            top_k=int(about["top_k"]),
            activations=about["inputs"].get("activations"),
            settings=about["settings"],
            groups=groups_from_json(about.get("router_groups")),
            spread=_spread(table, held, about.get("spread")),
            experts_per_layer=counts,
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise DataError(f"{file} is incomplete ({cause}); score again") from cause
    if not scores.table().equals(table):
        raise DataError(f"{file} lacks or repeats experts; score again")
    return scores


def _dense(column: pl.Series, held: NDArray[np.bool_]) -> NDArray[Any]:
    """A column by layer and expert, 0 where there is no expert; ValueError if it is too long."""
    values = column.to_numpy()
    found = np.zeros(held.shape, values.dtype)
    found[held] = values
    return found


def _spread(
    table: pl.DataFrame, held: NDArray[np.bool_], about: Mapping[str, Any] | None
) -> Spread | None:
    """The spread in a table, if there is one."""
    if about is None:
        return None
    arrays: dict[str, Any] = {name: _dense(table[name], held) for name in SPREAD_COLUMNS}
    return Spread(**arrays, **about)


def _read(file: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The table and the manifest in a scores file."""
    if not file.exists():
        raise DataError(f"{file} does not exist; make it with score")
    try:
        about = json.loads(pl.read_parquet_metadata(file).get("moecollab", "{}"))
        table = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError, ValueError) as cause:
        raise DataError(f"{file} is not a readable Parquet file; score again") from cause
    known = COLUMNS | (SPREAD_COLUMNS if isinstance(about, dict) and "spread" in about else {})
    if not isinstance(about, dict) or dict(table.schema) != known:
        expected = ", ".join(f"{name} {dtype}" for name, dtype in COLUMNS.items())
        raise SchemaError(f"{file} is not a file of scores; expected columns {expected}")
    return table, about
