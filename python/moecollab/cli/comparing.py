"""The command that holds criteria against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Batch, Context, Dtype, Model, Overwrite, numbers
from moecollab.errors import SettingsError

if TYPE_CHECKING:
    import polars as pl

SHOWN = "comparison.html"


def compare(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    corpus: Annotated[Path, typer.Argument(help="Calibration text: .txt, .jsonl, .parquet")],
    held_out: Annotated[Path, typer.Option(help="Text that judges, apart from the calibration")],
    out: Annotated[Path, typer.Option(help="Folder for everything; a stopped run goes on in it")],
    criteria: Annotated[
        str | None, typer.Option(help="Names between commas; see: moecollab criteria")
    ] = None,
    drops: Annotated[str, typer.Option(help="Shares of the experts to drop")] = "0.25,0.5",
    per: Annotated[str, typer.Option(help="layer, model or both: layer,model")] = "layer",
    seeds: Annotated[int, typer.Option(help="Calibrations, each on its own documents")] = 3,
    share: Annotated[float, typer.Option(help="Share of the documents in each calibration")] = 0.5,
    atoms: Annotated[
        str | None, typer.Option(help="Groups per level for criteria of patterns: 64,128")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval task; may be repeated")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with your own task YAML")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task")] = None,
    context: Context = 512,
    batch_size: Batch = 8,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measures what every criterion's cuts cost on held-out text, and ranks the criteria.

    Example: moecollab compare models/olmoe calibration.jsonl --held-out held_out.jsonl
    --criteria coverage,reap,easy_ep,random --drops 0.25,0.5 --seeds 5 --out run/comparison
    """
    with progress.show():
        found = mc.compare(
            model,
            corpus,
            held_out,
            out=out,
            criteria=None if criteria is None else _names(criteria),
            drops=_shares(drops),
            per=_names(per),  # type: ignore[arg-type]
            seeds=seeds,
            share=share,
            fits=mc.HSDL(atoms=numbers("atoms", atoms)),
            tasks=tuple(tasks or ()),
            task_folder=task_folder,
            limit=limit,
            context=context,
            batch_size=batch_size,
            dtype=dtype,
            overwrite=overwrite,
        )
    figure = mc.comparison_figure(found)
    figure.write_html(out / SHOWN, include_plotlyjs=True, config={"displayModeBar": False})
    for measure in found.measures:
        _print(found.standings(measure), measure)
    typer.echo(f"{out}: {found!r}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shares(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as cause:
        raise SettingsError("drops", text, "shares between commas, such as 0.25,0.5") from cause


def _print(table: pl.DataFrame, measure: str) -> None:
    """One table per budget and share, the best criterion first."""
    from rich.console import Console
    from rich.table import Table

    unit = "nats a token" if measure == "loss" else "share of questions"
    for (per, drop), part in table.group_by("per", "drop", maintain_order=True):
        best, critical = part["criterion"][0], part["critical"][0]
        shown = Table(
            title=f"{measure}: cost of dropping {drop:.1%} per {per}, {unit}",
            caption=None
            if critical != critical  # not a number: one domain has no ranks to tell apart
            else f"ranks that differ by less than {critical:.2f} are not told apart",
            title_justify="left",
        )
        for column in ("criterion", "cost", "95 %", f"more than {best}", "95 %", "mean rank"):
            shown.add_column(column, justify="left" if column == "criterion" else "right")
        for row in part.iter_rows(named=True):
            shown.add_row(
                row["criterion"],
                f"{row['cost']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
                f"{row['difference']:.4f}",
                f"{row['difference_low']:.4f} to {row['difference_high']:.4f}",
                f"{row['rank']:.2f}",
            )
        Console(width=max(100, Console().width)).print(shown)
