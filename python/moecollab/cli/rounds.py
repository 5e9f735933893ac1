"""The command that drops a part at a time."""

from __future__ import annotations

from typing import Annotated

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import (
    Batch,
    Context,
    Corpus,
    Criterion,
    Dtype,
    Floor,
    Keep,
    Model,
    Out,
    Overwrite,
    PerScores,
    Seed,
    Tokens,
    say,
)


def iterate(  # noqa: PLR0913 (one parameter per option)
    model: Model,
    corpus: Corpus,
    criterion: Criterion,
    drop: Annotated[float, typer.Option(help="Share of the experts gone at the end, in [0, 1)")],
    out: Out,
    rounds: Annotated[int, typer.Option(help="Recordings; each drops an equal share more")] = 4,
    per: PerScores = "layer",
    floor: Floor = 0,
    keep: Keep = None,
    tokens: Tokens = None,
    context: Context = 512,
    batch_size: Batch = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Makes a plan in rounds: record, score, drop a part, and again on the masked model.

    A run that was stopped goes on where it was when started again with the same options.

    Example: moecollab iterate models/olmoe calibration.jsonl --criterion reap --drop 0.5
    --out run/iterated
    """
    with progress.show():
        made = mc.iterate(
            model,
            corpus,
            criterion,
            drop=drop,
            out=out,
            rounds=rounds,
            per=per,
            floor=floor,
            keep=keep,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
        )
    say(f"{out}: {made!r}")
