"""The result of a comparison: its cells, losses and answers, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl

from moecollab.errors import DataError
from moecollab.evaluation.comparing.measuring import FULL
from moecollab.evaluation.comparing.notes import notes
from moecollab.evaluation.comparing.standing import Standing, standings
from moecollab.evaluation.evaluation import Evaluation, load_evaluation
from moecollab.evaluation.tasks import TaskResult
from moecollab.manifest import MANIFEST, check_manifest, open_whole, read_json

LOSS = "loss"
CELLS = {
    "seed": pl.Int64,
    "criterion": pl.String,
    "per": pl.String,
    "drop": pl.Float64,
    "cut": pl.String,
    "dropped": pl.Int64,
}
VALUES = {
    "cut": pl.String,
    "measure": pl.String,
    "item": pl.String,
    "domain": pl.String,
    "size": pl.Float64,
    "value": pl.Float64,
    "worse": pl.Float64,
}
TABLES = {"cells.parquet": CELLS, "values.parquet": VALUES}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What every criterion's cuts cost.

    Parameters
    ----------
    cells : DataFrame
        A row per seed, criterion, budget and share: seed, criterion, per, drop, cut (name of the
        measurement, shared by cells that keep the same experts) and dropped (number of experts).
    values : DataFrame
        What was measured, a row per cut, measure and item: cut, measure ("loss", or task and
        metric), item (document or question), domain, size (predicted tokens, or 1), value (summed
        nats, or the metric) and worse (how much worse than the full model's, in the same unit,
        summed). The full model is the cut "full".
    about : mapping
        The manifest: settings, digests of inputs, versions, and under "measured" the sizes of the
        model and of the calibrations.
    """

    cells: pl.DataFrame
    values: pl.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measures(self) -> list[str]:
        """What was measured: the loss, then tasks."""
        return self.values["measure"].unique(maintain_order=True).to_list()

    def costs(self) -> pl.DataFrame:
        """A row per cell, measure and domain: size, value and cost a token or question."""
        keys = ["cut", "measure", "domain"]
        summed = self.values.group_by(keys, maintain_order=True).agg(
            pl.col("size", "value", "worse").sum()
        )
        per_item = summed.with_columns(pl.col("value", "worse") / pl.col("size"))
        return self.cells.join(per_item, on="cut", maintain_order="left_right").rename(
            {"worse": "cost"}
        )

    def standings(
        self, measure: str = LOSS, *, reference: str | None = None, seed: int = 0
    ) -> pl.DataFrame:
        """A row per budget, share and criterion: cost, intervals and mean rank, best first.

        Parameters
        ----------
        measure : str
            One of `measures`.
        reference : str, optional
            Criterion that the others are held against; the best of each budget if not given.
        seed : int
            Seed of the resampling.

        Returns
        -------
        DataFrame
            Columns per, drop, criterion, cost (mean over seeds, nats a token or share of the
            questions), low, high (95 %, seeds and items drawn again), difference (from the
            reference), difference_low, difference_high, rank (mean over domains; 1 is best) and
            critical (ranks that differ by less are not told apart, Nemenyi's test at 5 %).
        """
        return standings(self, Standing(measure=measure, reference=reference, seed=seed))

    def notes(self, measure: str = LOSS) -> list[str]:
        """Sentences for the foot of `standings`: how far ranks and intervals can be trusted."""
        return notes(self, self.about, measure)

    def write(self, folder: Path) -> None:
        """Writes the tables into a folder."""
        for name, table in (("cells.parquet", self.cells), ("values.parquet", self.values)):
            with open_whole(folder / name) as file:
                table.write_parquet(file)
        with open_whole(folder / "costs.parquet") as file:
            self.costs().write_parquet(file)

    def __repr__(self) -> str:
        names = self.cells["criterion"].unique(maintain_order=True).to_list()
        return (
            f"Comparison({len(names)} criteria × {self.cells['drop'].n_unique()} shares × "
            f"{self.cells['per'].n_unique()} budgets × {self.cells['seed'].n_unique()} seeds, "
            f"{self.cells['cut'].n_unique()} different cuts; measured: {', '.join(self.measures)})"
        )


def tidy(cells: pl.DataFrame, measured: Path) -> Comparison:
    """The comparison of some cells, from the files of their cuts."""
    whole = load_evaluation(measured / f"{FULL}.json")
    full = _rows(FULL, whole)
    parts, asked = [full.select(list(VALUES))], _results(whole)
    for name in cells["cut"].unique(maintain_order=True):
        cut = load_evaluation(measured / f"{name}.json")
        asked = _asked_alike(asked, cut, name)
        parts.append(_against(_rows(name, cut), full, name))
    return Comparison(cells, pl.concat(parts).cast(VALUES))  # type: ignore[arg-type]


def _results(found: Evaluation) -> dict[tuple[str, str, str], TaskResult]:
    return {(task.task, task.metric, task.filter): task for task in found.tasks}


def _asked_alike(
    asked: dict[tuple[str, str, str], TaskResult], cut: Evaluation, name: str
) -> dict[tuple[str, str, str], TaskResult]:
    """What is known of the questions so far, or DataError when the cut was asked others."""
    own = _results(cut)
    if own.keys() != asked.keys() or any(not asked[key].asked_as(own[key]) for key in own):
        raise DataError(
            f"cut {name} answered other questions than the full model; the tasks changed since "
            "the run began, so pass overwrite=True (--overwrite) to start anew"
        )
    # Files of older versions do not say in which words they asked: the first that does counts.
    return {key: asked[key] if asked[key].prompts else own[key] for key in own}


def _against(found: pl.DataFrame, full: pl.DataFrame, name: str) -> pl.DataFrame:
    """The rows with how much worse each is than the full model's."""
    keys = ["measure", "item", "domain", "size", "sign"]
    if not found.select(keys).equals(full.select(keys)):
        raise DataError(f"cut {name} was measured on other text; remove its file and run again")
    worse = (found["value"] - full["value"]) * found["sign"]
    return found.with_columns(worse=worse).select(list(VALUES))


def _rows(name: str, found: Evaluation) -> pl.DataFrame:
    """What was measured of one cut; the sign says which direction is worse."""
    rows: list[dict[str, Any]] = [
        {"measure": LOSS, "item": document, "domain": domain, "size": tokens, "value": nll}
        | {"sign": 1.0}
        for document, domain, tokens, nll in found.measured().iter_rows()
    ]
    for task in found.tasks:
        sign = -1.0 if task.higher_is_better in (True, None) else 1.0
        label = f"{task.task} {task.metric}" + ("" if task.filter == "none" else f" {task.filter}")
        rows += [
            {"measure": label, "item": f"{number}", "domain": task.task, "size": 1.0}
            | {"value": value, "sign": sign}
            for number, value in enumerate(task.values)
        ]
    kinds = {key: kind for key, kind in VALUES.items() if key not in ("cut", "worse")}
    table = pl.DataFrame(rows, schema=kinds | {"sign": pl.Float64})
    return table.with_columns(cut=pl.lit(name), worse=pl.lit(0.0)).select([*VALUES, "sign"])


def load_comparison(path: str | PathLike[str]) -> Comparison:
    """The comparison in a folder that ``compare`` made.

    Raises
    ------
    DataError
        When it is not finished or damaged.
    SchemaError
        When the folder is something else.
    """
    folder = Path(path)
    about = read_json(folder / MANIFEST)
    check_manifest(about, "comparison", 1, folder)
    tables = []
    for name, schema in TABLES.items():
        try:
            table = pl.read_parquet(folder / name)
        except (FileNotFoundError, pl.exceptions.PolarsError) as cause:
            raise DataError(
                f"{folder / name} cannot be read; run compare again, which goes on where it was"
            ) from cause
        if dict(table.schema) != schema:
            raise DataError(f"{folder / name} has other columns than expected; run compare again")
        tables.append(table)
    return Comparison(tables[0], tables[1], about)
