"""What a card says a smaller model costs: evaluations, checked to be of its model and plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from moecollab import progress
from moecollab.errors import DataError, UnsupportedModelError
from moecollab.manifest import check_manifest, read_json
from moecollab.models.keep import Keep
from moecollab.models.loading import ModelLike, digest_base, digest_tensors
from moecollab.models.masked import kept_of
from moecollab.models.streamed import StreamedModel

Row: TypeAlias = tuple[str, str, str, str, str]
"""Model, measure, value, standard error and size."""

_VALUES = ("value", "stderr")


def read_costs(given: Sequence[Any], model: ModelLike, keep: Keep) -> tuple[Row, ...]:
    """What evaluations measured of a model, or of it under a plan's mask.

    All weights of a model in a folder are read for it once, a layer at a time.

    Raises
    ------
    DataError
        When an evaluation is missing or not whole, or of another model or plan.
    SchemaError
        When a file is no evaluation.
    """
    read = [_evaluation(one) for one in given]
    rows = tuple(row for found in read for row in _rows_of(found))
    for found in read:
        _check_plan(found, keep, model)
    if read:
        _check_model(read, model)
    return rows


def cost_lines(rows: Sequence[Row]) -> list[str]:
    """The section of a card."""
    lines = ["", "## What it costs", ""]
    if not rows:
        return [
            *lines,
            "Not measured yet. On text and tasks of your own, here and on the base:",
            "",
            "```",
            "moecollab evaluate MODEL --corpus held_out.jsonl --tasks arc_easy --out pruned.json",
            "```",
        ]
    lines += ["| model | measure | value | standard error | n |", "| --- | --- | --: | --: | --: |"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _evaluation(given: Any) -> Mapping[str, Any]:  # noqa: ANN401 (an Evaluation or its file)
    """An evaluation as plain data."""
    if not isinstance(given, str | PathLike):
        found: Mapping[str, Any] = given.as_json()
        return found
    read = read_json(Path(given))
    check_manifest(read, "evaluation", 1, Path(given))
    return read


def _check_plan(found: Mapping[str, Any], keep: Keep, model: ModelLike) -> None:
    """Refuses what was measured neither on the model that is cut nor under this plan."""
    tried = found.get("plan")
    before = None if isinstance(model, nn.Module) else kept_of(model)
    fitting = [one.as_json()["keep"] for one in (keep, before) if one is not None]
    known = isinstance(tried, Mapping) and tried.get("keep") in fitting and "mode" not in tried
    if tried is not None and not known:
        raise DataError(
            f"evaluation {found.get('name')!r} is of another plan than the one that is cut; "
            "evaluate the whole model, or this plan under a mask"
        )


def _check_model(read: Sequence[Mapping[str, Any]], model: ModelLike) -> None:
    """Refuses what was measured on other weights, wherever they lay."""
    try:
        digest = _digest(model)
    except UnsupportedModelError as cause:
        progress.say(f"evaluations are not compared with the model: {cause}")
        return
    for found in read:
        inputs = found.get("inputs")
        measured = inputs.get("base") if isinstance(inputs, Mapping) else None
        if measured != digest:
            raise DataError(
                f"evaluation {found.get('name')!r} is of another model, "
                f"{found.get('model', 'not named')} (weights {measured or 'not told'}), than the "
                f"one that is cut (weights {digest}); evaluate that one, in the type of its files"
            )


def _digest(model: ModelLike) -> str:
    """Digest of all weights that no mask changes."""
    if isinstance(model, nn.Module):
        return digest_base(model, digest_tensors(model))
    return StreamedModel(model, device="cpu").digest_base()


def _rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    """Model, measure, value, standard error and size of every measure."""
    try:
        documents = found["documents"]
        name = " ".join(str(found["name"]).split()).replace("|", "\\|")
        if documents is not None:
            tokens = sum(documents["tokens"])
            loss = math.fsum(documents["nll"]) / tokens
            yield name, "loss, nats a token", f"{loss:.4f}", "", f"{tokens:,} tokens"
        for task in found["tasks"]:
            value, error = ("" if task[key] is None else f"{task[key]:.4g}" for key in _VALUES)
            yield name, f"{task['task']} {task['metric']}", value, error, f"{task['n']:,} questions"
    except (LookupError, TypeError, ZeroDivisionError) as cause:
        raise DataError(
            f"evaluation {found.get('name')!r} is not whole ({cause!r}); evaluate again"
        ) from cause
