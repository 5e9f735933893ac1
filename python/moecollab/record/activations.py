"""Recorded activations: tables on disk, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, MissingInputError, SchemaError, SettingsError
from moecollab.manifest import MANIFEST, check_manifest, digest_bytes, digest_file, read_json
from moecollab.record.folding import out_of_folds
from moecollab.record.recording import Recording
from moecollab.record.rows import Rows
from moecollab.record.schema import (
    COUNTS_KIND,
    FOLDS,
    KIND,
    SAMPLE_COLUMNS,
    SAMPLES,
    TALLIES,
    TOKEN_COLUMNS,
    TOKENS,
    VERSION,
    VOCABULARY,
    VOCABULARY_COLUMNS,
    check_table,
    layer_columns,
    layer_file,
)
from moecollab.record.tallies import Tallies, load_tallies

Span: TypeAlias = tuple[int, int]
Grain: TypeAlias = Literal["token", "sample", "sample_sum"]
Weights: TypeAlias = Literal["renormalised", "raw", "binary", "output"]


@dataclass(frozen=True)
class LayerTable:
    """What one MoE layer did to every token; arrays are read-only.

    Parameters
    ----------
    expert : uint16 array of shape (n_tokens, top_k)
        Expert ids, the largest weight first; meaningless where the weight is 0.
    weight : float32 array of shape (n_tokens, top_k)
        Coefficients of the experts' outputs.
    norm : float32 array of shape (n_tokens, top_k), or None
        L2 norms of the experts' outputs before the weight, if they were recorded.
    next : uint16 array of shape (n_tokens, n_next), or None
        Experts that the router found most probable among those it did not choose, if they were
        recorded; 65,535 where there are no more.
    """

    expert: NDArray[np.uint16]
    weight: NDArray[np.float32]
    norm: NDArray[np.float32] | None
    next: NDArray[np.uint16] | None = None


@dataclass(frozen=True)
class Activations(Recording):
    """Router activations of a model on a corpus, in a folder.

    Made by :func:`moecollab.extract`, opened by :func:`load_activations`; tables are read when
    they are asked for.
    """

    @property
    def n_tokens(self) -> int:
        """Recorded tokens, padding excluded."""
        return int(self.manifest["corpus"]["n_tokens"])

    @property
    def n_samples(self) -> int:
        """Recorded samples: documents, or what the token limit left of them."""
        return int(self.manifest["corpus"]["n_samples"])

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the samples, in alphabetical order."""
        return tuple(self.manifest["corpus"]["domains"])

    @property
    def has_norms(self) -> bool:
        """Whether norms of expert outputs were recorded."""
        return bool(self.manifest["settings"]["norms"])

    @property
    def groups(self) -> tuple[str, ...]:
        """What was summed, as in :data:`moecollab.record.sums.GROUPS`."""
        norms = ["norms"] if self.has_norms else []
        return ("routing", *norms, *self.manifest["settings"].get("collect", ()))

    @property
    def has_weights(self) -> bool:
        """Whether routing weights were recorded; else all weights of a token are equal."""
        return bool(self.manifest["model"].get("weights", True))

    def samples(self) -> pl.DataFrame:
        """One row per sample: sample, domain, n_tokens, text_start."""
        return self._table(SAMPLES)

    def tokens(self) -> pl.DataFrame:
        """One row per token: token, sample, position, token_id."""
        return self._table(TOKENS)

    def vocabulary(self) -> dict[int, str]:
        """Text of every token id that occurs."""
        table = self._table(VOCABULARY)
        return dict(zip(table["token_id"].to_list(), table["text"].to_list(), strict=True))

    def layer(self, layer: int, span: Span | None = None) -> LayerTable:
        """What one MoE layer did, for all tokens or those of a span (start, stop).

        `layer` is the model's own index.
        """
        self._check_layer(layer)
        table = self._table(layer_file(layer), self._columns, span)
        arrays = [table[name].rechunk().to_numpy() for name in self._columns]
        for array in arrays:
            array.flags.writeable = False
        named = dict(zip(self._columns, arrays, strict=True))
        return LayerTable(arrays[0], arrays[1], named.get("norm"), named.get("next"))

    def to_polars(self, layers: Sequence[int] | None = None) -> pl.LazyFrame:
        """One row per token, read when it is collected.

        Parameters
        ----------
        layers : sequence of int, optional
            The model's own indices; all MoE layers if None. Name them where few are wanted: Polars
            opens the file of every layer in the table, to a column at least.

        Returns
        -------
        LazyFrame
            token, sample, domain, position, token_id and, for each layer, expert_0, weight_0 (and
            norm_0 or next_0 where they were recorded), with the layer's index in place of the 0:
            expert ids Array(UInt16, top_k) and coefficients Array(Float32, top_k), the largest
            first.

        Examples
        --------
        >>> first = acts.layers[0]  # doctest: +SKIP
        >>> acts.to_polars().select("domain", f"expert_{first}").collect()  # doctest: +SKIP
        """
        domains = self._scan(SAMPLES).select("sample", "domain")
        tokens = self._scan(TOKENS).join(domains, on="sample", how="left", maintain_order="left")
        frames = [tokens.select("token", "sample", "domain", "position", "token_id")]
        try:
            wanted = list(self.layers if layers is None else layers)
        except TypeError as cause:
            raise SettingsError("layers", layers, f"a sequence, such as [{layers}]") from cause
        for layer in wanted:
            self._check_layer(layer)
            table = self._scan(layer_file(layer))
            frames.append(
                table.select(pl.col(name).alias(f"{name}_{layer}") for name in self._columns)
            )
        return pl.concat(frames, how="horizontal")

    def tallies(self) -> Tallies:
        """Sums by domain, layer and expert."""
        return load_tallies(self.path / TALLIES)

    def fold_tallies(self, *, by_domain: bool = False) -> Tallies | None:
        """Sums by fold of the documents, in the place of domains; None if none were recorded.

        Parameters
        ----------
        by_domain : bool
            Whether domains are kept apart as well; names are those of
            :func:`moecollab.record.folding.cell_name` then.
        """
        file = self.path / FOLDS
        if not file.exists():
            return None
        cells = load_tallies(file)
        return cells if by_domain else out_of_folds(cells)[1]

    def rows(self, grain: Grain = "token", weights: Weights = "renormalised") -> Rows:
        """The activation matrix as sparse rows.

        Parameters
        ----------
        grain : {"token", "sample", "sample_sum"}
            What a row stands for. A "sample_sum" row is the sum of a sample's token rows (eq. 1 of
            arXiv:2504.12359), a "sample" row the same divided by its number of tokens, so that
            long samples count no more than short ones.
        weights : {"renormalised", "raw", "binary", "output"}
            The values: routing weights divided by their sum within the token and layer, as they
            are, 1 for each routed expert, or weight times norm of the expert's output.

        Raises
        ------
        MissingInputError
            When "output" is asked for and norms were not recorded.
        """
        if grain not in get_args(Grain):
            raise SettingsError("grain", grain, ", ".join(map(repr, get_args(Grain))))
        if weights not in get_args(Weights):
            raise SettingsError("weights", weights, ", ".join(map(repr, get_args(Weights))))
        if weights == "output" and not self.has_norms:
            raise MissingInputError(
                "weights='output' needs norms of expert outputs, which were not recorded; "
                "extract again with norms=True"
            )
        if grain == "token":
            return self._token_rows(weights)
        return self._sample_rows(weights, mean=grain == "sample")

    def token_blocks(self, weights: Weights = "renormalised", size: int = 65_536) -> Iterator[Rows]:
        """The token rows in order, `size` at a time; only one block is read at once.

        Raises
        ------
        SettingsError
            When `size` is below 1.
        """
        if size < 1:
            raise SettingsError("size", size, "at least 1")
        for start in range(0, self.n_tokens, size):
            yield self.token_block(start, size, weights)

    def token_block(self, start: int, size: int, weights: Weights = "renormalised") -> Rows:
        """The token rows from `start` on, `size` of them or what is left."""
        return self._token_rows(weights, (start, min(start + size, self.n_tokens)))

    def digest(self) -> str:
        """Digest of the manifest, the tallies and all layers."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        names = [MANIFEST, TALLIES, *(layer_file(layer) for layer in self.layers)]
        return digest_bytes("".join(digest_file(self.path / name) for name in names).encode())

    @property
    def _columns(self) -> list[str]:
        """Columns of a layer's table that hold what was routed."""
        columns = layer_columns(self.top_k, norms=self.has_norms, n_next=self._n_next)
        return [name for name in columns if name not in TOKEN_COLUMNS]

    @property
    def _n_next(self) -> int:
        return int(self.manifest["model"].get("n_next", 0))

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise SettingsError("layer", layer, f"one of {list(self.layers)}")

    def _scan(self, name: str) -> pl.LazyFrame:
        return pl.scan_parquet(self.path / name)

    def _table(
        self, name: str, columns: list[str] | None = None, span: Span | None = None
    ) -> pl.DataFrame:
        try:
            if span is None:
                return pl.read_parquet(self.path / name, columns=columns)
            lazy = pl.scan_parquet(self.path / name).slice(span[0], span[1] - span[0])
            return (lazy if columns is None else lazy.select(columns)).collect()
        except (pl.exceptions.PolarsError, OSError) as cause:
            raise DataError(
                f"{self.path / name} is truncated or damaged; record the activations again"
            ) from cause

    def _entries(
        self, weights: Weights, span: Span | None = None
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Site and value of each slot, (n_tokens, top_k) per layer; unused slots have value 0."""
        for row, layer in enumerate(self.layers):
            table = self.layer(layer, span)
            site = table.expert.astype(np.uint32) + np.uint32(row * self.n_experts)
            yield site, _values(table, weights)

    def _token_rows(self, weights: Weights, span: Span | None = None) -> Rows:
        n_tokens = self.n_tokens if span is None else span[1] - span[0]
        shape = (n_tokens, self.n_layers, self.top_k)
        sites, values = np.empty(shape, np.uint32), np.empty(shape, np.float32)
        for row, (site, value) in enumerate(self._entries(weights, span)):
            order = np.argsort(site, axis=1, kind="stable")
            sites[:, row] = np.take_along_axis(site, order, axis=1)
            values[:, row] = np.take_along_axis(value, order, axis=1)
        used = values != 0
        indptr = np.zeros(n_tokens + 1, np.int64)
        np.cumsum(used.sum(axis=(1, 2)), out=indptr[1:])
        sample = self._table(TOKENS, ["sample"], span)["sample"].to_numpy()
        return Rows(indptr, sites[used], values[used], np.ascontiguousarray(sample), self.n_sites)

    def _sample_rows(self, weights: Weights, *, mean: bool) -> Rows:
        sample = self.tokens()["sample"].to_numpy().astype(np.int64)
        length = np.bincount(sample, minlength=self.n_samples) if mean else np.ones(self.n_samples)
        shape = (self.n_samples, self.n_experts)
        found = []
        for row, (site, value) in enumerate(self._entries(weights)):
            first = row * self.n_experts
            key = sample[:, None] * self.n_experts + np.where(value != 0, site - first, 0)
            total = np.bincount(key.ravel(), value.ravel(), self.n_samples * self.n_experts)
            value = (total.reshape(shape) / length[:, None]).astype(np.float32)
            which, expert = np.nonzero(value)
            found.append((which, expert + first, value[which, expert]))
        which, sites, values = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((sites, which))
        indptr = np.searchsorted(which[order], np.arange(self.n_samples + 1)).astype(np.int64)
        numbers = np.arange(self.n_samples, dtype=np.uint32)
        return Rows(indptr, sites[order].astype(np.uint32), values[order], numbers, self.n_sites)

    def __repr__(self) -> str:
        model = self.manifest["model"]
        extra = "with" if self.has_norms else "without"
        return (
            f"Activations({model['class']}: {self.n_layers} MoE layers × {self.n_experts} experts, "
            f"top {self.top_k}; {self.n_tokens} tokens in {self.n_samples} samples of "
            f"{len(self.domains)} domains, {extra} norms)"
        )


def _values(table: LayerTable, weights: Weights) -> NDArray[np.float32]:
    """Value of each slot: float32 array of shape (n_tokens, top_k)."""
    if weights == "binary":
        used: NDArray[np.float32] = (table.weight != 0).astype(np.float32)
        return used
    if weights == "output" and table.norm is not None:
        weighted: NDArray[np.float32] = table.weight * table.norm
        return weighted
    if weights == "raw":
        return table.weight
    total = table.weight.sum(axis=1, dtype=np.float64, keepdims=True)
    share: NDArray[np.float64] = np.zeros(table.weight.shape)
    np.divide(table.weight, total, out=share, where=total != 0)
    renormalised: NDArray[np.float32] = share.astype(np.float32)
    return renormalised


def load_activations(path: str | PathLike[str]) -> Activations:
    """Opens a folder of recorded activations, after checking that it is whole.

    Raises
    ------
    DataError
        When a file is missing or truncated.
    SchemaError
        When the folder is of another kind or version, or a file has other columns.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no activations (no {MANIFEST}); make them with extract")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") == COUNTS_KIND:
        raise SchemaError(
            f"{folder} holds counts without single tokens, which can be scored but not fitted or "
            "mined; import files that hold tokens"
        )
    check_manifest(manifest, KIND, VERSION, folder)
    try:
        acts = Activations(folder, manifest)
        n_tokens, n_samples = acts.n_tokens, acts.n_samples
        columns = layer_columns(acts.top_k, norms=acts.has_norms, n_next=acts._n_next)
        layers = acts.layers
    except (KeyError, TypeError, ValueError) as cause:
        raise SchemaError(f"{folder / MANIFEST} lacks {cause}; record again") from cause
    check_table(folder / TOKENS, TOKEN_COLUMNS, n_tokens)
    check_table(folder / SAMPLES, SAMPLE_COLUMNS, n_samples)
    check_table(folder / VOCABULARY, VOCABULARY_COLUMNS)
    for layer in layers:
        check_table(folder / layer_file(layer), columns, n_tokens)
    shape = acts.tallies().count.shape
    if shape != (len(acts.domains), acts.n_layers, acts.n_experts):
        raise SchemaError(f"{folder / TALLIES} has shape {shape}; record the activations again")
    return acts
