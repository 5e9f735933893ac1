"""Commands that look inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Batch, Context, Corpus, Dtype, Model, Out, Overwrite, Seed, say
from moecollab.manifest import refuse_existing


def super_experts(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    corpus: Corpus,
    out: Out,
    layers: Annotated[
        Literal["massive", "depth", "growth"],
        typer.Option(help="Which layers: where massive activations grow, or the first 75 %, …"),
    ] = "massive",
    percentile: Annotated[
        float | None, typer.Option(help="Above this percentile of all; 99.5 from 1,000 experts on")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Above this part of the largest")] = 0.1,
    among: Annotated[
        Literal["layers", "model"], typer.Option(help="Whose outputs thresholds are of")
    ] = "layers",
    reduction: Annotated[
        Literal["all", "first_row"],
        typer.Option(help="Over all tokens, or each window's first as published code has it"),
    ] = "all",
    shared: Annotated[bool, typer.Option(help="Count shared experts")] = True,
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure on what is lost without them")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Draws of other experts beside them")] = 5,
    write: Annotated[int, typer.Option(help="Tokens written to see repetition")] = 64,
    tokens: Annotated[int | None, typer.Option(help="Read this many tokens at most")] = 65_536,
    context: Context = 512,
    batch_size: Batch = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Finds super experts: the few whose outputs make massive activations and attention sinks.

    The file is read by mc.load_super_experts, and by plan --keep, which then drops none of them;
    a page with a figure lies beside it.

    Example: moecollab super-experts models/olmoe calibration.jsonl --held-out held_out.jsonl
    --out run/super.json

    Without a model of your own: moecollab demo, then moecollab super-experts embedded
    demo-run/calibration.jsonl --out run/super.json
    """
    page = out.with_suffix(".html")
    refuse_existing(page, overwrite=overwrite)
    with progress.show():
        found = mc.super_experts(
            model,
            corpus,
            layers=layers,
            percentile=percentile,
            ratio=ratio,
            among=among,
            reduction=reduction,
            shared=shared,
            held_out=held_out,
            seeds=seeds,
            write=write,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            out=out,
            overwrite=overwrite,
        )
    mc.super_experts_figure(found).write_html(
        page, include_plotlyjs=True, config={"displayModeBar": False}
    )
    say(f"{out}, {page}: {found!r}")
    for line in found.lines():
        typer.echo(line)
