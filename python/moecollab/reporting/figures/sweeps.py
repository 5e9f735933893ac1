"""Figure of a sweep: what each setting explains, how many groups it keeps, how stable they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moecollab.errors import SchemaError
from moecollab.reporting.figures.style import GONE, KEPT, QUIET, escape, styled

if TYPE_CHECKING:
    import polars as pl

PANELS = (
    ("held_out_error", "unexplained share of held-out rows", KEPT),
    ("live", "groups in use", KEPT),
    ("stability", "agreement between seeds", GONE),
    ("covered", "share of experts in a group", QUIET),
)
NOT_SETTINGS = {
    "seed",
    "objective",
    "live_finest",
    "members",
    "codes_per_row",
    "seconds",
    *(name for name, _, _ in PANELS),
}


def sweep_figure(frame: pl.DataFrame) -> go.Figure:
    """The settings of a sweep beside each other, a panel per measure and a dot per seed.

    Parameters
    ----------
    frame : polars.DataFrame
        What :meth:`moecollab.HSDL.sweep` returned.
    """
    missing = {name for name, _, _ in PANELS} - set(frame.columns)
    if missing:
        raise SchemaError(f"the table lacks {', '.join(sorted(missing))}; pass what sweep returned")
    settings = [name for name in frame.columns if name not in NOT_SETTINGS]
    labels = [
        escape(", ".join(f"{name} {value}" for name, value in zip(settings, line, strict=True)))
        for line in frame.select(settings).iter_rows()
    ]
    figure = make_subplots(
        rows=1,
        cols=len(PANELS),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[title for _, title, _ in PANELS],
    )
    for column, (name, title, color) in enumerate(PANELS, start=1):
        dots = go.Scatter(
            x=frame[name].to_list(),
            y=labels,
            customdata=frame["seed"].to_list(),
            mode="markers",
            marker={"color": color, "size": 9, "opacity": 0.7},
            hovertemplate="%{y}<br>seed %{customdata}<br>" + title + " %{x:.3g}<extra></extra>",
        )
        figure.add_trace(dots, row=1, col=column)
    figure.update_annotations(font={"size": 12})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(showlegend=False)
    return styled(figure, height=140 + 26 * len(set(labels)))
