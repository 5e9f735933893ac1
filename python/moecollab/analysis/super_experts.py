"""Super experts: the few whose outputs make the massive activations that attention sinks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.analysis.profiling import SHARED, Profile, profile
from moecollab.embedded import located
from moecollab.errors import DataError, SchemaError, SettingsError
from moecollab.evaluation.perplexity import window_of
from moecollab.evaluation.subject import Subject, open_subject
from moecollab.manifest import read_json, refuse_existing, versions, write_json
from moecollab.record.corpus import Source, read_corpus
from moecollab.record.windows import select_samples

Rule: TypeAlias = Literal["depth", "massive", "growth"]
Reduction: TypeAlias = Literal["all", "first_row"]
Among: TypeAlias = Literal["layers", "model"]

SCHEMA = 1
PERCENTILE, RATIO, DEPTH = 99.5, 0.1, 0.75
ENOUGH = 1_000
"""Experts from which on a percentile of 99.5 leaves more than a handful above it."""
MASSIVE, OVER_MEDIAN = 100.0, 1_000.0
GROWN, GROWTH = 1.5, 5.0


@dataclass(frozen=True)
class Rules:
    """How super experts are told from others.

    Parameters
    ----------
    layers : {"depth", "massive", "growth"}
        Layers in which experts may be super. "depth": index below round(0.75 N), as the published
        code has it. "massive": a hidden state after the layer has an entry > 100 and ≥ 1,000 times
        the median (Sun et al. 2024, arXiv:2402.17762) that is 1.5 times what went in or more.
        "growth": the largest entry after the layer is more than 5 times the largest before it.
    percentile : float, optional
        An expert must be above this percentile (linear interpolation) of all; 99.5 if None, but no
        percentile for fewer than 1,000 experts, of which it would leave too few.
    ratio : float
        An expert must be above this part of the largest.
    among : {"layers", "model"}
        Whether thresholds are of the experts of the chosen layers or of the whole model.
    reduction : {"all", "first_row"}
        Largest output over all tokens, or over the first that each window routes to the expert, as
        the published code has it.
    include_shared : bool
        Whether shared experts are counted and may be super.
    """

    layers: Rule = "massive"
    percentile: float | None = None
    ratio: float = RATIO
    among: Among = "layers"
    reduction: Reduction = "all"
    include_shared: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("layers", Rule), ("among", Among), ("reduction", Reduction)):
            if getattr(self, name) not in get_args(kind):
                raise SettingsError(
                    name, getattr(self, name), f"one of {', '.join(get_args(kind))}"
                )
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise SettingsError("percentile", self.percentile, "from 0 to 100")
        if not 0 <= self.ratio < 1:
            raise SettingsError("ratio", self.ratio, "in [0, 1)")


@dataclass(frozen=True)
class SuperExperts:
    """Super experts of a model and what they were found by.

    Parameters
    ----------
    experts : DataFrame
        As in :class:`moecollab.analysis.profiling.Profile`, with `value` (what is compared),
        `kind` ("super", "outlier": as large but in other layers, or "") and `token`, the text of
        the token with the largest entry; the largest value first.
    hidden : DataFrame
        Largest hidden states by layer.
    layers : tuple of int
        Layers in which experts may be super.
    thresholds : tuple of float
        What an expert must be above: the percentile (NaN if none) and the part of the largest.
    rules : Rules
    about : mapping
        Model, digests, tokens, versions.
    effects : DataFrame, optional
        What it does to take experts away; see :func:`moecollab.analysis.ablation.ablate`.
    sinks : DataFrame, optional
        What becomes of attention sinks.
    """

    experts: pl.DataFrame
    hidden: pl.DataFrame
    layers: tuple[int, ...]
    thresholds: tuple[float, float]
    rules: Rules
    about: Mapping[str, Any]
    effects: pl.DataFrame | None = None
    sinks: pl.DataFrame | None = None

    @property
    def found(self) -> list[tuple[int, int]]:
        """(layer, expert) of the super experts, the largest first; -1 is a shared one."""
        return self._named("super")

    @property
    def outliers(self) -> list[tuple[int, int]]:
        """(layer, expert) of those that are as large but in layers where none is super."""
        return self._named("outlier")

    @property
    def keep(self) -> dict[int, list[int]]:
        """Routed super experts by layer, which ``plan(keep=…)`` takes."""
        kept: dict[int, list[int]] = {}
        for layer, expert in sorted(self.found):
            if expert != SHARED:
                kept.setdefault(layer, []).append(expert)
        return kept

    def lines(self) -> list[str]:
        """What was found, a line for each expert and for each set that was taken away."""
        rows = self.experts.filter(pl.col("kind") != "").iter_rows(named=True)
        said = [
            f"{row['kind']}: {_name(row['layer'], row['expert'])}, largest output "
            f"{row['value']:.4g} in channel {row['channel']} at position {row['position']}"
            for row in rows
        ]
        if not self.layers:
            said.append("no hidden state is massive, so no expert can be super")
        if self.effects is None:
            return said
        by_set = self.effects.group_by("set", maintain_order=True).agg(pl.col("added").mean())
        return (
            said
            + [f"loss added without {one}: {added:.4f}" for one, added in by_set.iter_rows()][1:]
        )

    def _named(self, kind: str) -> list[tuple[int, int]]:
        rows = self.experts.filter(pl.col("kind") == kind)
        return list(rows.select("layer", "expert").iter_rows())

    def save(self, out: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes all of it to a JSON file that :func:`load_super_experts` reads."""
        tables = {name: getattr(self, name) for name in ("experts", "hidden", "effects", "sinks")}
        value = {
            "schema": SCHEMA,
            "kind": "super_experts",
            "about": dict(self.about),
            "layers": list(self.layers),
            "thresholds": [None if np.isnan(one) else one for one in self.thresholds],
            "rules": vars(self.rules),
            "keep": {str(layer): ids for layer, ids in self.keep.items()},
        }
        value |= {name: _columns(table) for name, table in tables.items()}
        write_json(Path(out), value, overwrite=overwrite)

    def __repr__(self) -> str:
        names = [_name(*one) for one in self.found]
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        said = f"{len(names)} of {len(self.experts)}{': ' if names else ''}{shown}"
        return f"SuperExperts({said}; {len(self.outliers)} as large in other layers)"


def _name(layer: int, expert: int) -> str:
    return f"layer {layer} " + ("shared" if expert == SHARED else f"expert {expert}")


def super_experts(  # noqa: PLR0913 (the verb takes what the command takes)
    model: Any,  # noqa: ANN401 (path, model or what is applied to one)
    corpus: Source,
    *,
    layers: Rule = "massive",
    percentile: float | None = None,
    ratio: float = RATIO,
    among: Among = "layers",
    reduction: Reduction = "all",
    shared: bool = True,
    held_out: Source | None = None,
    seeds: int = 5,
    write: int = 64,
    tokens: int | None = 65_536,
    context: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    tokenizer: Any = None,  # noqa: ANN401
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> SuperExperts:
    """Finds the experts whose outputs are far larger than all others', and what they are for.

    Parameters
    ----------
    model : Module, path or hub name
        The model; a loaded one needs `tokenizer`.
    corpus : path, dataset or iterable
        Any text: super experts are said not to depend on it.
    layers, percentile, ratio, among, reduction
        How super experts are told from others; see :class:`Rules`.
    shared : bool
        Whether shared experts are counted and may be super.
    held_out : path, dataset or iterable, optional
        Text to measure on what is lost when they are taken away, together and one by one, beside
        as many others drawn at random; see :func:`moecollab.analysis.ablation.ablate`.
    seeds, write : int
        Draws of each control, and tokens that are written after each of eight beginnings to see
        repetition, for that.
    tokens : int, optional
        Most tokens to read; all if None.
    context, batch_size, seed, dtype, tokenizer
        As in :func:`moecollab.extract`.
    out : path, optional
        File for the result.

    Raises
    ------
    UnsupportedModelError
        When the model is dense or its family is not known.

    Notes
    -----
    Su et al., "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
    arXiv:2507.23279, equation 6. Differs: the largest output is over all tokens and not the first
    row (`reduction`), what is shared is told apart, and layers that carry massive activations are
    found from hidden states, where the published code has a rule of depth only.
    """
    from moecollab.analysis.ablation import ablate

    rules = Rules(layers, percentile, ratio, among, reduction, shared)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    text, judge = read_corpus(corpus), None if held_out is None else read_corpus(held_out)
    subject = open_subject(located(model), tokenizer, dtype)

    def tokenize(one: str) -> NDArray[np.uint32]:
        return np.asarray(subject.tokenizer(one, verbose=False)["input_ids"], np.uint32)

    samples = select_samples(text, tokenize, limit=tokens, seed=seed)
    window = window_of(subject.model.config, context)
    seen = profile(subject.model, samples, context=window, batch_size=batch_size)
    found = _spelled(select(seen, rules, about=_about(subject, seen, text.digest)), subject)
    if judge is not None:
        found = ablate(
            subject, found, judge, seeds=seeds, write=write, context=window, batch_size=batch_size
        )
    if out is not None:
        found.save(out, overwrite=overwrite)
    return found


def _spelled(found: SuperExperts, subject: Subject) -> SuperExperts:
    """With the text of the tokens that have the largest entries."""
    tokens = found.experts.select("token_id", "tokens").iter_rows()
    spelled = [subject.tokenizer.decode([one]) if n else "" for one, n in tokens]
    return replace(found, experts=found.experts.with_columns(pl.Series("token", spelled)))


def _about(subject: Subject, seen: Profile, text: str) -> dict[str, Any]:
    return {
        "model": subject.path,
        "digest": subject.digest,
        "text": text,
        "tokens": seen.n_tokens,
        "windows": seen.n_windows,
        "versions": versions(),
    }


def select(
    seen: Profile, rules: Rules | None = None, about: Mapping[str, Any] | None = None
) -> SuperExperts:
    """Super experts by other rules, from a pass that was made."""
    rules = rules or Rules()
    layers = LAYERS[rules.layers](seen)
    column = "max_abs" if rules.reduction == "all" else "first_row"
    table = seen.experts.with_columns(pl.col(column).alias("value"))
    if not rules.include_shared:
        table = table.filter(pl.col("expert") != SHARED)
    among = table if rules.among == "model" else table.filter(pl.col("layer").is_in(layers))
    high, part = thresholds(among["value"].to_numpy(), rules.percentile, rules.ratio)
    large = (pl.col("value") > part) & (pl.lit(np.isnan(high)) | (pl.col("value") > high))
    large &= pl.col("tokens") > 0
    here = pl.col("layer").is_in(layers)
    kind = pl.when(large & here).then(pl.lit("super")).when(large).then(pl.lit("outlier"))
    table = table.with_columns(kind.otherwise(pl.lit("")).alias("kind"))
    table = table.sort("value", "layer", "expert", descending=[True, False, False])
    return SuperExperts(table, seen.hidden, layers, (high, part), rules, about or {})


def thresholds(
    values: NDArray[np.float64], percentile: float | None, ratio: float
) -> tuple[float, float]:
    """What an expert must be above: a percentile of all (NaN if none) and a part of the largest."""
    if not len(values):
        return float("nan"), float("inf")
    if percentile is None and len(values) < ENOUGH:
        return float("nan"), ratio * float(values.max())
    high = np.percentile(values, PERCENTILE if percentile is None else percentile)
    return float(high), ratio * float(values.max())


def _by_depth(seen: Profile) -> tuple[int, ...]:
    return tuple(range(round(DEPTH * seen.n_layers)))


def _massive(seen: Profile) -> tuple[int, ...]:
    largest, median = pl.col("max_abs"), pl.col("median_abs")
    massive = (largest > MASSIVE) & (largest >= OVER_MEDIAN * median)
    grown = largest >= GROWN * pl.col("before")
    found = seen.hidden.filter((pl.col("layer") >= 0) & massive & grown)
    return tuple(found["layer"].to_list())


def _grown(seen: Profile) -> tuple[int, ...]:
    found = seen.hidden.filter(pl.col("max_abs") > GROWTH * pl.col("max_abs").shift(1))
    return tuple(found["layer"].to_list())


LAYERS = {"depth": _by_depth, "massive": _massive, "growth": _grown}
"""Layers in which experts may be super, by the name of the rule."""


def load_super_experts(path: str | PathLike[str]) -> SuperExperts:
    """Reads what :meth:`SuperExperts.save` wrote.

    Raises
    ------
    SchemaError
        When the file holds something else.
    """
    value = read_json(Path(path))
    if value.get("kind") != "super_experts" or value.get("schema") != SCHEMA:
        raise SchemaError(f"{path} holds no super experts of schema {SCHEMA}; make it again")
    try:
        return SuperExperts(
            experts=pl.DataFrame(dict(value["experts"])),
            hidden=pl.DataFrame(dict(value["hidden"])),
            layers=tuple(value["layers"]),
            thresholds=_pair(value["thresholds"]),
            rules=Rules(**value["rules"]),
            about=value["about"],
            effects=_table(value["effects"]),
            sinks=_table(value["sinks"]),
        )
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as cause:
        raise DataError(f"{path} is damaged ({cause}); make it again") from cause


def _pair(values: Sequence[float | None]) -> tuple[float, float]:
    high, part = (float("nan") if one is None else float(one) for one in values)
    return high, part


def _columns(table: pl.DataFrame | None) -> list[Any] | None:
    """Names and values, in order."""
    return None if table is None else [[one.name, one.to_list()] for one in table]


def _table(value: list[Any] | None) -> pl.DataFrame | None:
    return None if value is None else pl.DataFrame(dict(value))
