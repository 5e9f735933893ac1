"""The log of what lm-eval asked and what the model answered, as JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl

from moecollab.errors import SettingsError
from moecollab.manifest import open_whole, refuse_existing

SUFFIXES = (".jsonl", ".parquet")
COLUMNS = ("task", "filter", "document", "asked", "target", "answers", "taken", "scores")
SCHEMA = {name: pl.Int64 if name == "document" else pl.String for name in COLUMNS}


def check_samples(path: str | PathLike[str], *, overwrite: bool) -> Path:
    """The path of a log, if it can be written; before any work."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise SettingsError("samples", str(path), f"a file ending in {' or '.join(SUFFIXES)}")
    refuse_existing(file, overwrite=overwrite)
    return file


def sample_table(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> pl.DataFrame:
    """What was asked, in lm-eval's own order.

    Parameters
    ----------
    samples : mapping of task to samples
        As lm-eval logs them.

    Returns
    -------
    DataFrame
        Columns task, filter, document (its number), asked, target, answers, taken (the answers
        that the filter leaves) and scores; what is not plain text is JSON.
    """
    rows = [_row(task, one) for task, many in samples.items() for one in many]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def write_samples(path: Path, table: pl.DataFrame) -> None:
    """Writes a log whole or not at all, in the form that its name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path) as file:
        if path.suffix == ".parquet":
            table.write_parquet(file)
        else:
            table.write_ndjson(file)


def _row(task: str, sample: Mapping[str, Any]) -> tuple[Any, ...]:
    scores = {name: sample[name] for name in sample["metrics"] if name in sample}
    asked = (sample["arguments"], sample["target"], sample["resps"], sample["filtered_resps"])
    question, target, answers, taken = (_text(one) for one in asked)
    number = int(sample["doc_id"])
    return task, sample["filter"], number, question, target, answers, taken, _text(scores)


def _text(value: object) -> str:
    """Text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
