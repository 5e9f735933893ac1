"""Commands that take experts out, for a trial or for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Dtype, Model, Out, Overwrite, PlanFile, say
from moecollab.manifest import read_json


def mask(
    model: Model,
    plan: PlanFile,
    out: Out,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Writes a small folder that stands for the model with the dropped experts switched off.

    No weights are copied; extract and evaluate take the folder as a model.

    Example: moecollab mask models/olmoe run/plan.json --out run/masked
    """
    mc.mask(model, plan, dtype=dtype, out=out, overwrite=overwrite)
    say(f"{out}: {model} masked by {plan}")


def prune(
    model: Model,
    plan: PlanFile,
    out: Out,
    uneven: Annotated[
        Literal["equalise", "pad", "native"] | None,
        typer.Option(help="How layers of different numbers are written: see docs/pruning.md"),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(help="File made by evaluate, for the README; or several"),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of the checkpoint")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read it again and compare it with the model's folder")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Cuts the dropped experts out and writes a smaller checkpoint.

    A model in a folder is copied file by file and never built, so it may be larger than memory;
    run the same again to go on after a kill.

    Example: moecollab prune models/olmoe run/plan.json --out run/pruned --verify
    """
    with progress.show():
        mc.prune(
            model,
            plan,
            out=out,
            uneven=uneven,
            evaluations=evaluations,
            shard_size=shard_size,
            verify=verify,
            overwrite=overwrite,
        )
    loads = read_json(out / "moecollab.json")["loads"]
    say(f"{out}: {model} without the experts that {plan} drops; {loads}")
