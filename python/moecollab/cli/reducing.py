"""Commands that make a smaller model other than by dropping, or mend it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Batch, Corpus, Model, Out, Overwrite, PlanFile, Seed, say


def merge(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    plan: PlanFile,
    out: Out,
    how: Annotated[
        Literal["hc_smoe", "m_smoe", "dek", "ream", "mone"], typer.Option(help="Method")
    ] = "hc_smoe",
    activations: Annotated[
        Path | None, typer.Option(help="Folder made by extract --collect channels")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text to run all experts on: .txt, .jsonl, .parquet")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens of the text; all if not")] = None,
    router: Annotated[
        Literal["dominant", "mean"] | None, typer.Option(help="Router row of a group")
    ] = None,
    align: Annotated[
        bool | None, typer.Option("--align/--no-align", help="Bring neurons into one order first")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Merges experts into as many as the plan keeps and writes a smaller checkpoint.

    Example: moecollab merge models/olmoe run/plan.json --how ream --corpus calibration.jsonl
    --tokens 8192 --out run/merged
    """
    with progress.show():
        mc.merge(
            model,
            plan,
            how=how,
            activations=activations,
            corpus=corpus,
            tokens=tokens,
            router=router,
            align=align,
            seed=seed,
            out=out,
            overwrite=overwrite,
        )
    say(f"{out}: {model} with experts merged by {how} to as many as {plan} keeps")


def repair(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    corpus: Corpus,
    out: Out,
    plan: Annotated[
        Path | None, typer.Option(help="File made by plan; the model is then the whole one")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The whole model, where the other is small already")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches at most")] = 200,
    minutes: Annotated[float | None, typer.Option(help="Time after which training ends")] = None,
    rate: Annotated[float, typer.Option(help="Adam's step size at the start")] = 1e-3,
    batch_size: Batch = 8,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Prunes a model and trains its routers and norms to predict what the whole one does.

    Example: moecollab repair models/olmoe calibration.jsonl --plan run/plan.json --minutes 10
    --out run/repaired
    """
    with progress.show():
        found = mc.repair(
            model,
            corpus,
            plan=plan,
            teacher=teacher,
            steps=steps,
            minutes=minutes,
            rate=rate,
            batch_size=batch_size,
            seed=seed,
            out=out,
            overwrite=overwrite,
        )
    say(f"{out}: {found!r}")
