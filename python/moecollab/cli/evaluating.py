"""The command that measures a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import AnyBatch, Context, Dtype, Model, Out, Overwrite, Seed, say


def evaluate(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    out: Out,
    corpus: Annotated[
        Path | None, typer.Option(help="Held-out text: .txt, .jsonl, .parquet")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval task; may be repeated")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with your own task YAML")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task, and prompts (else 32)")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Log of questions and answers: .jsonl, .parquet")
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens to write after each prompt")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="Text to go on with, in place of held-out text")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second, memory and disk")
    ] = False,
    context: Context = 512,
    batch_size: AnyBatch = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measures held-out loss, lm-eval tasks, repetition in what the model writes, and speed.

    A run that was stopped goes on where it was, by task, when started again alike.

    Example: moecollab evaluate run/pruned --corpus held_out.jsonl --tasks arc_easy --limit 200
    --generate 128 --speed --out run/evaluations/pruned.json

    Without a model of your own: moecollab demo, then moecollab evaluate embedded
    --corpus demo-run/held_out.jsonl --out run/embedded.json
    """
    with progress.show():
        found = mc.evaluate(
            model,
            corpus=corpus,
            tasks=tuple(tasks or ()),
            task_folder=task_folder,
            limit=limit,
            samples=samples,
            generate=generate,
            prompts=prompts,
            speed=speed,
            context=context,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            out=out,
            overwrite=overwrite,
        )
    say(f"{out}: {found!r}")
