"""Commands that decide what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import (
    Criterion,
    Floor,
    Keep,
    Out,
    Overwrite,
    PerScores,
    Seed,
    decimals,
    say,
)

Per = Annotated[
    Literal["layer", "model", "entropy", "similarity"],
    typer.Option(help="Layers drop equally many, or share a budget of the model"),
]
Drop = Annotated[float | None, typer.Option(help="Share of the experts to drop, in [0, 1)")]
Experts = Annotated[int | None, typer.Option(help="Experts to keep: of each layer, or overall")]
Mass = Annotated[float | None, typer.Option(help="Share of the scores to keep, in (0, 1]")]


def plan(  # noqa: PLR0913 (one parameter per option)
    scores: Annotated[Path, typer.Argument(help="File made by score")],
    out: Out,
    drop: Drop = None,
    experts: Experts = None,
    mass: Mass = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Most gigabytes of what is left; needs --model")
    ] = None,
    per: Per = "layer",
    floor: Floor = 0,
    groups: Annotated[
        int | None, typer.Option(help="Router groups, if the scores do not know them")
    ] = None,
    keep: Keep = None,
    drop_list: Annotated[
        Path | None, typer.Option(help="JSON of experts that go, {layer: [ids]}, or a plan")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the whole model, for --memory-gb"),
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


def export(
    ranked: Annotated[Path, typer.Argument(help="File made by score or plan")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Writes ranked lists of experts, for engines that prune while they load.

    Example: moecollab export run/plan.json --out run/ranking.jsonl
    """
    found = mc.export_ranking(ranked, out, overwrite=overwrite)
    n_experts = len(next(iter(found.values())))
    say(f"{out}: {n_experts} experts of each of {len(found)} layers, best first")


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


def uncertainty(  # noqa: PLR0913 (one parameter per option)
    criterion: Criterion,
    activations: Annotated[
        list[Path], typer.Argument(help="Folders made by extract: one, or one per seed")
    ],
    out: Out,
    collaboration: Annotated[
        list[Path] | None,
        typer.Option(help="Folder made by fit; again for each recording, or for fits of one"),
    ] = None,
    drop: Drop = None,
    experts: Experts = None,
    mass: Mass = None,
    per: PerScores = "layer",
    floor: Floor = 0,
    folds: Annotated[
        int | None,
        typer.Option(help="Parts of the documents that are drawn; the recording's own, or 64"),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Draws")] = 200,
    confidence: Annotated[float, typer.Option(help="Part of the draws in an interval")] = 0.95,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Scores every expert and says how sure scores and a plan are, by resampling documents.

    For criteria that a recording and patterns answer; the model does not run.

    Example: moecollab uncertainty run/activations --criterion caep --collaboration
    run/collaboration --drop 0.5 --out run/scores/caep.parquet
    """
    with progress.show():
        found = mc.uncertainty(
            criterion,
            activations,
            collaboration=collaboration or None,
            drop=drop,
            experts=experts,
            mass=mass,
            per=per,
            floor=floor,
            folds=folds,
            resamples=resamples,
            confidence=confidence,
            seed=seed,
            out=out,
            overwrite=overwrite,
        )
    say(f"{out}: {found!r}")


def agreement(
    scores: Annotated[list[Path], typer.Argument(help="Files made by score, two or more")],
    out: Annotated[Path | None, typer.Option(help="Parquet file for the table")] = None,
    drop: Annotated[float, typer.Option(help="Share dropped by the plans compared")] = 0.5,
    per: PerScores = "layer",
    overwrite: Overwrite = False,
) -> None:
    """Compares how criteria, seeds or texts rank the experts, every two of them.

    Example: moecollab agreement run/scores/reap.parquet run/scores/caep.parquet --drop 0.25
    """
    found = mc.agreement(scores, drop=drop, per=per, out=out, overwrite=overwrite)
    for row in found.iter_rows(named=True):
        known = [name for name in ("spearman", "kendall", "jaccard") if row[name] is not None]
        shown = ", ".join(f"{name} {row[name]:.3f}" for name in known)
        say(f"{row['first']} and {row['second']}: {shown}")
