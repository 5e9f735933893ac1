"""The command that holds criteria against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Batch, Context, Dtype, Model, Overwrite
from moecollab.errors import DataError, SettingsError, unknown_name

if TYPE_CHECKING:
    import polars as pl

SHOWN = "comparison.html"
_FITS = "such as {output: {rows: sample, atoms: [64, 128]}}"


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
    fits: Annotated[
        Path | None, typer.Option(help="YAML of fits for criteria of patterns: name, settings")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval task; may be repeated")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with your own task YAML")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task")] = None,
    probe_tokens: Annotated[
        int, typer.Option(help="Most tokens on which a criterion runs the model again")
    ] = 8_192,
    context: Context = 512,
    batch_size: Batch = 8,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measures what every criterion's cuts cost on held-out text, and ranks the criteria.

    Example: moecollab compare models/olmoe calibration.jsonl --held-out held_out.jsonl
    --criteria coverage,reap,easy_ep,random --drops 0.25,0.5 --seeds 5 --out run/comparison

    Without a model of your own: moecollab demo, then moecollab compare embedded
    demo-run/calibration.jsonl --held-out demo-run/held_out.jsonl --out run/comparison

    A file of fits: {output: {rows: sample, weights: output, atoms: [64, 128]}}; caep@output reads
    it, caep the first.
    """
    with progress.show():
        found = mc.compare(
            model,
            corpus,
            held_out,
            out=out,
            criteria=criteria,
            drops=_shares(drops),
            per=per,
            seeds=seeds,
            share=share,
            fits=None if fits is None else _fits(fits),
            tasks=tuple(tasks or ()),
            task_folder=task_folder,
            limit=limit,
            probe_tokens=probe_tokens,
            context=context,
            batch_size=batch_size,
            dtype=dtype,
            overwrite=overwrite,
        )
    page = mc.comparison_page(found, out / SHOWN, overwrite=True)
    for measure in found.measures:
        _print(found.standings(measure), measure)
        for note in found.notes(measure):
            typer.echo(note)
    typer.echo(f"{out}: {found!r}")
    typer.echo(f"page: {page}")


def _shares(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as cause:
        raise SettingsError("drops", text, "shares between commas, such as 0.25,0.5") from cause


def _fits(path: Path) -> dict[str, mc.HSDL]:
    """The fits in a YAML file: a name for each, and settings of HSDL."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as cause:
        first = next(iter(str(cause).splitlines()), "")
        raise DataError(f"{path} cannot be read as YAML ({first}); write {_FITS}") from cause
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise DataError(f"{path} does not hold names with settings of fits; write {_FITS}")
    if not found:
        raise DataError(f"{path} holds no fit; write {_FITS}")
    return {str(name): _fit(one) for name, one in found.items()}


def _fit(settings: dict[str, Any]) -> mc.HSDL:
    known = [name for name in mc.HSDL().get_params() if name != "seed"]  # each calibration has one
    for name in settings:
        if name not in known:
            raise unknown_name("setting of a fit", name, known)
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    return mc.HSDL(**given)


def _print(table: pl.DataFrame, measure: str) -> None:
    """One table per budget and share, the best criterion first."""
    from rich.console import Console
    from rich.table import Table

    unit = "nats a token" if measure == "loss" else "share of questions"
    for (per, drop), part in table.group_by("per", "drop", maintain_order=True):
        best = part["criterion"][0]
        title = f"{measure}: cost of dropping {drop:.1%} per {per}, {unit}"
        shown = Table(title=title, title_justify="left")
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
