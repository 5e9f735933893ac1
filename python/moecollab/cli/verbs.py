"""The commands: each calls the API verb of the same name with the same options."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.comparing import compare
from moecollab.cli.cutting import mask, prune
from moecollab.cli.deciding import agreement, blend, export, plan, uncertainty
from moecollab.cli.evaluating import evaluate
from moecollab.cli.imports import import_
from moecollab.cli.options import (
    Batch,
    Context,
    Corpus,
    Criterion,
    Dtype,
    Model,
    Out,
    Overwrite,
    Recorded,
    Rows,
    Seed,
    Threads,
    Tokens,
    Weights,
    held,
    numbers,
)
from moecollab.cli.options import say as _say
from moecollab.cli.reducing import merge, repair
from moecollab.cli.rounds import iterate
from moecollab.cli.studies import sweep
from moecollab.manifest import refuse_existing


def extract(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    corpus: Corpus,
    out: Out,
    tokens: Tokens = None,
    norms: Annotated[bool, typer.Option(help="Record the norms of expert outputs")] = True,
    collect: Annotated[
        str, typer.Option(help="What else to sum, or criteria that need it: channels,pairs")
    ] = "",
    context: Context = 512,
    batch_size: Batch = 8,
    seed: Seed = 0,
    folds: Annotated[
        int, typer.Option(help="Parts of the text summed apart too, to resample; 0 for none")
    ] = 0,
    dtype: Dtype = "auto",
    layer_by_layer: Annotated[
        bool,
        typer.Option(
            "--layer-by-layer",
            help="Hold one layer at a time: for large models",
            is_eager=True,  # so that it is known when --hidden-gb is looked at
        ),
    ] = False,
    hidden_gb: Annotated[
        float,
        typer.Option(help="Gigabytes of hidden states held, layer by layer", callback=held),
    ] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Records which experts a model uses on a text.

    A run that was stopped goes on where it was when started again with the same options.

    Example: moecollab extract models/olmoe calibration.jsonl --out run/activations

    Without a model of your own: moecollab demo, then moecollab extract embedded
    demo-run/calibration.jsonl --out run/activations
    """
    with progress.show():
        acts = mc.extract(
            model,
            corpus,
            out=out,
            tokens=tokens,
            norms=norms,
            collect=collect,
            context=context,
            batch_size=batch_size,
            seed=seed,
            folds=folds,
            dtype=dtype,
            layer_by_layer=layer_by_layer,
            hidden_gb=hidden_gb,
            overwrite=overwrite,
        )
    _say(f"{out}: {acts!r}")


def fit(  # noqa: PLR0913 (one parameter per option)
    activations: Recorded,
    out: Out,
    atoms: Annotated[
        str | None, typer.Option(help="Groups per level, coarse to fine: 64,128")
    ] = None,
    dictionary_size: Annotated[float, typer.Option(help="Weight of the number of groups")] = 1.0,
    sparsity: Annotated[
        float | None, typer.Option(help="Weight of the code sparsity (lambda 1)")
    ] = None,
    reconstruction: Annotated[float, typer.Option(help="Weight of the error (lambda 2)")] = 300.0,
    loss: Annotated[
        Literal["l1", "l2"], typer.Option(help="Absolute (the paper's) or squared errors")
    ] = "l1",
    copies: Annotated[
        bool, typer.Option("--copies", help="Let finer groups copy the coarser ones")
    ] = False,
    rows: Rows = "token",
    weights: Weights = "renormalised",
    max_iterations: Annotated[int, typer.Option(help="Longest fit, in rounds per stage")] = 100,
    tolerance: Annotated[float, typer.Option(help="Stop at this relative change")] = 1e-3,
    seed: Seed = 0,
    n_init: Annotated[int, typer.Option(help="Seeds to try; the best fit is kept")] = 1,
    threads: Threads = None,
    rows_in_memory: Annotated[
        int, typer.Option(help="Tokens held at once; with more, passes go over blocks")
    ] = 524_288,
    overwrite: Overwrite = False,
) -> None:
    """Finds groups of experts that work together across layers (HSDL).

    A stopped fit of more tokens than are held at once goes on where it was.

    Example: moecollab fit run/activations --rows sample --out run/collaboration
    """
    refuse_existing(out, overwrite=overwrite)
    settings = mc.HSDL(
        atoms=numbers("atoms", atoms),
        dictionary_size=dictionary_size,
        sparsity=sparsity,
        reconstruction=reconstruction,
        loss=loss,
        copies=copies,
        rows=rows,
        weights=weights,
        max_iterations=max_iterations,
        tolerance=tolerance,
        seed=seed,
        n_init=n_init,
        threads=threads,
        rows_in_memory=rows_in_memory,
    )
    checkpoint = out.parent / f".{out.name}.partial"
    with progress.show():
        found = settings.fit(mc.load_activations(activations), checkpoint=checkpoint)
    found.save(out, overwrite=overwrite)
    _say(f"{out}: {found!r}")
    if found.stop_reason == "interrupted":
        more = "goes on from there" if checkpoint.exists() else "fits again"
        typer.echo(f"stopped; {out} holds the best so far, --overwrite {more}", err=True)
        raise typer.Exit(130)
    shutil.rmtree(checkpoint, ignore_errors=True)


def mine(  # noqa: PLR0913 (one parameter per option)
    acts: Recorded,
    out: Out,
    size: Annotated[int, typer.Option(help="Experts in a set: 2, 3 … 6")] = 2,
    min_support: Annotated[float, typer.Option(help="Least share of the tokens")] = 0.001,
    top: Annotated[
        int | None,
        typer.Option(help="Sets to keep; 5 million pairs or 100,000 larger if not given"),
    ] = None,
    by: Annotated[
        Literal["count", "lift"], typer.Option(help="What the kept are best in")
    ] = "count",
    null: Annotated[
        Literal["load", "token", "none"],
        typer.Option(help="Chance: each expert keeps its load, or its load with each token id"),
    ] = "load",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Counts every pair, or larger set, of experts and compares with chance; the control for fit.

    Example: moecollab mine run/activations --size 2 --null token --out run/pairs
    """
    with progress.show():
        found = mc.mine(
            acts,
            size,
            min_support=min_support,
            top=top,
            by=by,
            null=null,
            threads=threads,
            out=out,
            overwrite=overwrite,
        )
    _say(f"{out}: {found!r}")


def score(  # noqa: PLR0913 (one parameter per option)
    criterion: Criterion,
    out: Out,
    activations: Annotated[
        Path | None, typer.Argument(help="Folder made by extract; not needed to score weights")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name, for criteria that read or run it"),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text for criteria that run the model")
    ] = None,
    collaboration: Annotated[Path | None, typer.Option(help="Folder made by fit")] = None,
    domains: Annotated[
        str | None, typer.Option(help="Domains of the text to score by: law,code")
    ] = None,
    drop: Annotated[
        float, typer.Option(help="Share you mean to drop; sets CAEP's threshold")
    ] = 0.25,
    tokens: Annotated[int | None, typer.Option(help="Run this many tokens of it at most")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Scores every expert by one criterion; higher means keep.

    Example: moecollab score run/activations --criterion caep --collaboration run/collaboration
    --out run/scores/caep.parquet
    """
    found = mc.score(
        criterion,
        activations,
        model=model,
        corpus=corpus,
        collaboration=collaboration,
        domains=domains,
        drop=drop,
        tokens=tokens,
        seed=seed,
        out=out,
        overwrite=overwrite,
    )
    _say(f"{out}: {found!r}")


def report(
    run: Annotated[Path, typer.Argument(help="Folder with activations, collaboration, plans …")],
    out: Out,
    title: Annotated[str | None, typer.Option(help="Headline of the page")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes one HTML page that shows what was found.

    Example: moecollab report run --out run/report.html
    """
    _say(f"{mc.report(out, run=run, title=title, overwrite=overwrite)}: report of {run}")


def demo(
    out: Out = Path("demo-run"),
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Runs everything on the embedded model and text and leaves a report and every file.

    Example: moecollab demo --out demo-run
    """
    from moecollab.demo.demo import run_demo

    with progress.show():
        page = run_demo(out, seed=seed, threads=threads, overwrite=overwrite)
    _say(f"report: {page.resolve()}")


def criteria() -> None:
    """Lists the criteria by what they read, with needs, direction and source, and which to use."""
    from moecollab.criteria import listing

    typer.echo(listing.listing())


VERBS: tuple[Callable[..., None], ...] = (
    extract,
    import_,
    fit,
    sweep,
    mine,
    score,
    uncertainty,
    agreement,
    blend,
    plan,
    export,
    iterate,
    mask,
    prune,
    merge,
    repair,
    evaluate,
    compare,
    report,
    demo,
    criteria,
)
"""Every command, in the order of the data flow."""


def command_name(verb: Callable[..., None]) -> str:
    """What a verb is called on the command line, where Python's own words are free."""
    return verb.__name__.removesuffix("_")
