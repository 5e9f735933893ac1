"""All levels of a squared-error fit moved together, on rows held in memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from moecollab.patterns.blocks import use_of
from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Collaboration, by_use
from moecollab.patterns.passes import Descent, graver
from moecollab.patterns.steps import Arrays, Levels, enter, leave, steps_of
from moecollab.progress import track
from moecollab.record.rows import Rows


def fit_together(collab: Collaboration, rows: Rows, threads: int | None) -> Collaboration:
    """The same fit after passes that move all levels, as long as they gain.

    Ctrl-C ends it with the best pass so far.
    """
    steps = steps_of(collab.settings, threads or 0)
    weight = np.full(rows.n_rows, 1 / rows.n_rows)

    def measure(levels: Levels, number: int) -> tuple[Arrays, Codes]:  # noqa: ARG001
        first = levels.stages[0]
        codes = steps.code(rows, first)
        shares = steps.share(rows, weight, first, codes)
        count = {"rows": np.array(float(rows.n_rows))}
        return {**use_of(codes, len(first.atoms)), **shares, **count}, codes

    with track("fit levels together") as bar:

        def watch(row: dict[str, Any]) -> None:
            bar.advance()
            bar.remark(f"{row['stage']}: objective {row['total']:.6g}")

        descent, stop = Descent(steps, measure, "joint", watch), "interrupted"
        with suppress(KeyboardInterrupt):
            levels = enter(collab.levels, rows.n_rows, steps)
            stop = descent.run(levels, collab.settings["max_iterations"])
    best = descent.best
    if best is None or best.objective >= collab.objective:
        return replace(collab, stop_reason=graver(collab.stop_reason, stop))
    found, place = by_use(leave(best.levels, rows.n_rows))
    final = best.row | {"stage": "final", "iteration": 0}
    return replace(
        collab,
        levels=found,
        codes=best.codes.scaled(best.levels.largest()).renamed(place),
        history=(*collab.history[:-1], *descent.rows, final),
        stop_reason=graver(collab.stop_reason, stop),
    )
