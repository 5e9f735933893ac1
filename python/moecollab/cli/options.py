"""Options that several commands take, and reading their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moecollab.errors import SettingsError


def batch_size_of(asked: str | int) -> int | str:
    """A batch size as written: a number, or auto."""
    if asked == "auto":
        return "auto"
    try:
        return int(asked)
    except ValueError as cause:
        raise typer.BadParameter(f"{asked!r} is neither a whole number nor auto") from cause


Model = Annotated[
    str,
    typer.Argument(help="Folder or hub name of a model, a masked model, or: embedded"),
]
Out = Annotated[Path, typer.Option(help="Where the result goes")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result")]
PerScores = Annotated[
    Literal["layer", "model", "entropy"],
    typer.Option(help="Layers drop equally many, or share a budget of the model"),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice")]
Context = Annotated[int, typer.Option(help="Tokens read at once; longer text is read in pieces")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Batch = Annotated[int, typer.Option(help="Windows run at once")]
AnyBatch = Annotated[
    Any,
    typer.Option(
        help="Sequences run at once, or auto: what memory holds",
        parser=batch_size_of,
        metavar="INTEGER|auto",
    ),
]
Corpus = Annotated[Path, typer.Argument(help=".txt, .jsonl (text, domain) or .parquet file")]
Tokens = Annotated[int | None, typer.Option(help="Record this many tokens at most")]
Recorded = Annotated[Path, typer.Argument(help="Folder made by extract")]
Rows = Annotated[
    Literal["token", "sample", "sample_sum"],
    typer.Option(help="What a row is"),
]
Weights = Annotated[
    Literal["renormalised", "raw", "binary", "output"],
    typer.Option(help="What an entry is"),
]
Threads = Annotated[int | None, typer.Option(help="Threads; all cores if not given")]
Criterion = Annotated[str, typer.Option(help="See: moecollab criteria")]
Floor = Annotated[int, typer.Option(help="Experts that every layer keeps at least")]
Keep = Annotated[
    Path | None,
    typer.Option(help="JSON of experts that stay, {layer: [ids]}, or a plan"),
]
PlanFile = Annotated[Path, typer.Argument(help="File made by plan")]


def say(what: object) -> None:
    """One line on stdout: what was made."""
    typer.echo(" ".join(str(what).split()))


def numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as cause:
        raise SettingsError(name, text, "whole numbers between commas, such as 64,128") from cause


def decimals(name: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as cause:
        raise SettingsError(name, text, "numbers between commas, such as 100,300") from cause


def held(context: typer.Context, hidden_gb: float) -> float:
    """Refuses memory for hidden states where none are held."""
    source = context.get_parameter_source("hidden_gb")
    given = source is not None and source.name == "COMMANDLINE"
    if given and not context.params["layer_by_layer"]:
        raise typer.BadParameter("it works with --layer-by-layer; give both or leave it out")
    return hidden_gb
