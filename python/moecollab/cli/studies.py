"""Commands that compare many fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Overwrite, Recorded, Rows, Threads, Weights, decimals
from moecollab.errors import SettingsError
from moecollab.manifest import new_folder


def sweep(  # noqa: PLR0913 (one parameter per option)
    activations: Recorded,
    out: Annotated[Path, typer.Option(help="Folder for sweep.parquet and sweep.html")],
    atoms: Annotated[
        list[str] | None, typer.Option(help="Groups per level, coarse to fine; may be repeated")
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Weights to try: 1,30,300")] = None,
    reconstruction: Annotated[str | None, typer.Option(help="Weights to try: 100,300")] = None,
    rows: Rows = "token",
    weights: Weights = "renormalised",
    seeds: Annotated[int, typer.Option(help="Fits of each combination")] = 2,
    held_out: Annotated[float, typer.Option(help="Share of the samples that only judges")] = 0.2,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Fits every combination of some settings, to choose the number of groups and the weights.

    Example: moecollab sweep run/activations --atoms 32,64 --atoms 128,512 --reconstruction 100,300
    --out run/sweep
    """
    grid: dict[str, list[object]] = {}
    if atoms:
        grid["atoms"] = [tuple(int(n) for n in decimals("atoms", text)) for text in atoms]
    for name, text in (("sparsity", sparsity), ("reconstruction", reconstruction)):
        if text is not None:
            grid[name] = list(decimals(name, text))
    if not grid:
        raise SettingsError("grid", "empty", "given: --atoms, --sparsity or --reconstruction")
    hsdl = mc.HSDL(rows=rows, weights=weights, threads=threads)
    with progress.show(), new_folder(out, overwrite=overwrite) as folder:
        acts = mc.load_activations(activations)
        found = hsdl.sweep(acts, seeds=seeds, held_out=held_out, **grid)
        found.write_parquet(folder / "sweep.parquet")
        mc.sweep_figure(found).write_html(
            folder / "sweep.html", include_plotlyjs=True, config={"displayModeBar": False}
        )
    best = found.sort("held_out_error").row(0, named=True)
    chosen = ", ".join(f"{name} {best[name]}" for name in grid)
    typer.echo(
        f"{out}: {len(found)} fits; least held-out error {best['held_out_error']:.3f} with {chosen}"
    )
