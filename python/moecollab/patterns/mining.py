"""Exhaustive mining: every pair or larger set of experts, counted exactly; the control for HSDL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, MissingInputError, SettingsError, ShapeError
from moecollab.manifest import refuse_existing
from moecollab.patterns.mined import (
    HISTOGRAM_COLUMNS,
    RELATIONS,
    Mined,
    columns,
)
from moecollab.progress import track
from moecollab.record.activations import Activations, load_activations
from moecollab.record.rows import Rows
from moecollab.settings import check_whole, is_real, is_whole

if TYPE_CHECKING:
    from moecollab._core import MinedSets, MiningSettings

Null: TypeAlias = Literal["load", "token", "none"]
By: TypeAlias = Literal["count", "lift"]
MOST_MEMBERS = 6
CHANCE = ("expected", "z", "log10_p", "q")
TOP_PAIRS, TOP_SETS = 5_000_000, 100_000


@dataclass(frozen=True)
class Source:
    """Rows to mine, with what is known about their experts."""

    rows: Rows
    layers: tuple[int, ...]
    n_experts: int
    activations: str | None
    token_ids: NDArray[np.uint32] | None


def mine(  # noqa: PLR0913 (one parameter per option)
    acts: Activations | Rows | str | PathLike[str],
    size: int = 2,
    *,
    min_support: float = 0.001,
    top: int | None = None,
    by: By = "count",
    null: Null = "load",
    n_experts: int | None = None,
    threads: int | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Mined:
    """Sets of experts that are active in the same tokens, counted exactly, with significance.

    Every set of `size` experts over all layers is looked at (sites: 1,728 experts have 1.5 million
    pairs and 858 million triplets); memory is bounded by `top`. An expert is active where its
    weight is above 0.

    Parameters
    ----------
    acts : Activations, path or Rows
        What the routers did, token by token. Rows need `n_experts`.
    size : int
        Members of a set, in [2, 6]. Work grows by about a hundredfold per member.
    min_support : float
        Least share of the tokens a set is active in, in (0, 1].
    top : int, optional
        Sets to keep, ≥ 1; by default five million pairs, or 100,000 larger sets.
    by : {"count", "lift"}
        What the kept sets are the largest of.
    null : {"load", "token", "none"}
        What chance is. Tokens change places at random, independently in each layer: "load" lets
        all change with all, so that each expert keeps its load; "token" only those of equal token
        id, so that what a token's identity explains is chance too. Between two layers the count is
        then hypergeometric, or a sum of such, whose tail is that of a binomial of the same first
        three moments. Within a layer the exchange changes nothing; there the null draws the k
        experts of each token anew with every expert's load kept (conditional Poisson sampling).
        Nothing is simulated. "none" only counts. Details stand in ``docs/mining.md``.
    n_experts : int, optional
        Experts per layer; needed for rows, which know no layers.
    threads : int, optional
        Threads; one per processor by default. The result is the same for any number.
    out : path, optional
        Folder to write.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    SettingsError
        When a parameter is out of range.
    DataError
        When there is nothing to mine, or not enough memory.
    MissingInputError
        When the null needs token ids and rows have none.
    """
    _check_settings(size, min_support, top, by)
    _check_more(null, n_experts, threads)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    source = read_source(acts, n_experts)
    _check_source(source, size, null)
    n_rows = source.rows.n_rows
    least = max(1, math.ceil(round(min_support * n_rows, 9)))
    settings: MiningSettings = {
        "n_experts": source.n_experts,
        "size": size,
        "least": least,
        "top": top or (TOP_PAIRS if size == 2 else TOP_SETS),
        "by_lift": by == "lift",
        "chance": null != "none",
        "threads": threads or 0,
    }
    strata = source.token_ids if null == "token" else None
    found = _found(source, strata, settings)
    mined = Mined(
        table=_table(source, found),
        histogram=_histogram(found["histogram"]),
        size=size,
        n_rows=n_rows,
        least=least,
        layers=source.layers,
        n_experts=source.n_experts,
        settings={"min_support": min_support, "top": settings["top"], "by": by, "null": null},
        activations=source.activations,
    )
    if out is not None:
        mined.save(out, overwrite=overwrite)
    return mined


def read_source(acts: Activations | Rows | str | PathLike[str], n_experts: int | None) -> Source:
    """The rows of activations, or rows with what was said about them."""
    if isinstance(acts, Rows):
        if n_experts is None:
            raise MissingInputError(
                "rows do not say which layer an expert is in; pass n_experts, the experts per layer"
            )
        if acts.n_sites % n_experts:
            raise SettingsError("n_experts", n_experts, f"a divisor of the {acts.n_sites} sites")
        layers = tuple(range(acts.n_sites // n_experts))
        return Source(acts, layers, n_experts, None, None)
    opened = acts if isinstance(acts, Activations) else load_activations(acts)
    if n_experts not in (None, opened.n_experts):
        raise SettingsError("n_experts", n_experts, f"{opened.n_experts}, as recorded")
    token_ids = np.ascontiguousarray(opened.tokens()["token_id"].to_numpy(), dtype=np.uint32)
    rows = opened.rows("token", "binary")
    return Source(rows, opened.layers, opened.n_experts, opened.digest(), token_ids)


def count_sets(rows: Rows, sets: NDArray[np.uint32], threads: int | None = None) -> NDArray[Any]:
    """How many rows hold all sites of each set: uint32 array of shape (n_sets,).

    Parameters
    ----------
    rows : Rows
        Active sites of every token.
    sets : uint32 array of shape (n_sets, size)
        Sites of each set.
    threads : int, optional
        Threads; one per processor by default.
    """
    from moecollab._core import count_sets as count

    arrays = (rows.indptr, rows.sites, rows.values)
    return count(arrays, rows.n_sites, np.ascontiguousarray(sets, np.uint32), threads or 0)


def _found(
    source: Source, strata: NDArray[np.uint32] | None, settings: MiningSettings
) -> MinedSets:
    from moecollab._core import mine_sets

    rows = source.rows
    with track("mine", total=100) as bar:
        done = {"count": 0.0, "chance": 0.0}

        def watch(stage: str, share: float) -> None:
            bar.advance(50 * (share - done[stage]))
            bar.remark(stage)
            done[stage] = share

        arrays = (rows.indptr, rows.sites, rows.values)
        return mine_sets(arrays, rows.n_sites, strata, settings, watch)


def _table(source: Source, found: MinedSets) -> pl.DataFrame:
    size, count, lift = found["site"].shape[1], found["count"], found["lift"]
    sites = np.arange(source.rows.n_sites)
    layer = np.asarray(source.layers, np.uint32)[sites // source.n_experts]
    expert = (sites % source.n_experts).astype(np.uint16)
    members = [np.ascontiguousarray(found["site"][:, at]) for at in range(size)]
    table: dict[str, Any] = {}
    for letter, member in zip("abcdef", members, strict=False):
        table |= {f"layer_{letter}": layer[member], f"expert_{letter}": expert[member]}
    places = [member // np.uint32(source.n_experts) for member in members]
    table |= {
        "count": count,
        "support": count / source.rows.n_rows,
        "lift": lift,
        "pmi": np.log2(lift),
        "relation": pl.Series(RELATIONS, dtype=pl.Enum(RELATIONS)).gather(_relation(places)),
    }
    schema = columns(size)
    table |= _chance(found) or dict.fromkeys(CHANCE)
    return pl.DataFrame({name: table[name] for name in schema}, schema=schema)


def _chance(found: MinedSets) -> dict[str, pl.Series]:
    """What chance gives for every set, null where it has nothing to say; empty if not asked."""
    if len(found["expected"]) < len(found["count"]):
        return {}
    spread = np.sqrt(found["variance"])
    z = np.full(len(spread), np.nan)
    np.divide(found["count"] - found["expected"], spread, out=z, where=spread > 0)
    told = {"expected": found["expected"], "z": z, "log10_p": found["log10_p"], "q": found["q"]}
    return {name: pl.Series(values).fill_nan(None) for name, values in told.items()}


def _relation(places: list[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """0: two members share a layer; 1: no step is longer than one MoE layer; 2: the rest."""
    steps = [later - own for own, later in pairwise(places)]
    same = np.logical_or.reduce([step == 0 for step in steps])
    far = np.logical_or.reduce([step > 1 for step in steps])
    relation: NDArray[np.int64] = np.where(same, 0, 1 + far)
    return relation


def _histogram(n_sets: NDArray[Any]) -> pl.DataFrame:
    count = np.flatnonzero(n_sets)
    return pl.DataFrame({"count": count, "n_sets": n_sets[count]}, schema=HISTOGRAM_COLUMNS)


def _check_settings(size: object, min_support: object, top: object, by: object) -> None:
    if not is_whole(size) or not 2 <= int(str(size)) <= MOST_MEMBERS:
        raise SettingsError("size", size, f"a whole number in 2 to {MOST_MEMBERS}")
    if not is_real(min_support) or not 0 < float(str(min_support)) <= 1:
        raise SettingsError("min_support", min_support, "a share of the tokens in (0, 1]")
    if top is not None and (not is_whole(top) or not 1 <= int(str(top)) < 2**31):
        raise SettingsError("top", top, "a whole number of at least 1")
    if by not in get_args(By):
        raise SettingsError("by", by, " or ".join(map(repr, get_args(By))))


def _check_more(null: object, n_experts: object, threads: object) -> None:
    if null not in get_args(Null):
        raise SettingsError("null", null, " or ".join(map(repr, get_args(Null))))
    for name, value in (("n_experts", n_experts), ("threads", threads)):
        if value is not None:
            check_whole(name, value, 1)


def _check_source(source: Source, size: int, null: Null) -> None:
    rows = source.rows
    if rows.nnz == 0:
        raise DataError("there are no active experts to mine; record some text first")
    if rows.n_sites < size:
        raise DataError(
            f"there are {rows.n_sites} experts, too few for sets of {size}; record a larger model"
        )
    if null == "token" and source.token_ids is None:
        raise MissingInputError("null='token' needs token ids; mine activations, not rows")
    if null == "token" and source.token_ids is not None and len(source.token_ids) != rows.n_rows:
        raise ShapeError(f"{len(source.token_ids)} token ids for {rows.n_rows} rows; record again")
    _check_memory(needed_memory(rows, size))


def needed_memory(rows: Rows, size: int) -> int:
    """Bytes that mining takes at most, beside the rows themselves."""
    n_pairs = math.comb(rows.n_sites, 2)
    bits = rows.n_sites * rows.n_rows // 8
    per_pair = 140 if size == 2 else 8
    return 16 * rows.nnz + 2 * bits + per_pair * n_pairs


def _check_memory(needed: int) -> None:
    free = available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"mining needs about {needed / 2**30:.1f} GB of memory but {free / 2**30:.1f} GB are "
            "free; mine fewer tokens or a model with fewer experts, or on a larger machine"
        )


def available_memory() -> int | None:
    """Bytes that the system can still give, if it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
