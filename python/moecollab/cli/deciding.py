"""Commands that decide what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab.cli.options import Out, Overwrite, decimals, say


def plan(  # noqa: PLR0913 (one parameter per option)
    scores: Annotated[Path, typer.Argument(help="File made by score")],
    out: Out,
    drop: Annotated[
        float | None, typer.Option(help="Share of the experts to drop, in [0, 1)")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts to keep: of each layer, or of the model")
    ] = None,
    mass: Annotated[
        float | None, typer.Option(help="Share of the scores to keep, with the fewest experts")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Most gigabytes of what is left; needs --model")
    ] = None,
    per: Annotated[
        Literal["layer", "model", "entropy", "similarity"],
        typer.Option(help="Layers drop equally many, or share a budget of the model"),
    ] = "layer",
    floor: Annotated[int, typer.Option(help="Experts that every layer keeps at least")] = 0,
    groups: Annotated[
        int | None, typer.Option(help="Router groups, if the scores do not know them")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="JSON of experts that stay, {layer: [ids]}, or a plan")
    ] = None,
    drop_list: Annotated[
        Path | None, typer.Option(help="JSON of experts that go, {layer: [ids]}, or a plan")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the whole model, for --memory-gb")
    ] = None,
    similarity: Annotated[
        Path | None, typer.Option(help=".npy of (layers, experts, experts), for --per similarity")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Decides which experts to drop, under a budget that is said in one way.

    Example: moecollab plan run/scores/caep.parquet --drop 0.25 --out run/plan.json
    """
    found = mc.plan(
        scores,
        drop=drop,
        experts=experts,
        mass=mass,
        memory_gb=memory_gb,
        per=per,
        floor=floor,
        groups=groups,
        keep=keep,
        drop_list=drop_list,
        model=model,
        similarity=similarity,
        out=out,
        overwrite=overwrite,
    )
    say(f"{out}: {found!r}")


def blend(
    scores: Annotated[list[Path], typer.Argument(help="Files made by score, one per domain")],
    out: Out,
    how: Annotated[
        Literal["sum", "fair"], typer.Option(help="Add shares; or raise the worst domain's")
    ] = "sum",
    weights: Annotated[str | None, typer.Option(help="A weight per file, for sum: 1,1,0.5")] = None,
    drop: Annotated[
        float | None, typer.Option(help="Share of the experts that you mean to drop, for fair")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Puts scores of several domains together.

    Example: moecollab blend run/scores/law.parquet run/scores/code.parquet --how fair --drop 0.5
    --out run/scores/both.parquet
    """
    chosen = None if weights is None else decimals("weights", weights)
    found = mc.blend(scores, how=how, weights=chosen, drop=drop, out=out, overwrite=overwrite)
    say(f"{out}: {found!r}")
