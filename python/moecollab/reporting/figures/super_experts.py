"""Figure of super experts: largest outputs and hidden states by layer, and what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from moecollab.reporting.figures.style import GONE, INK, KEPT, QUIET, escape, styled

if TYPE_CHECKING:
    from moecollab.analysis.super_experts import SuperExperts

KINDS = (
    ("", "expert", QUIET, 5),
    ("outlier", "as large, late", KEPT, 9),
    ("super", "super", GONE, 11),
)


def super_experts_figure(found: SuperExperts) -> go.Figure:
    """Largest output of every expert and largest hidden state, by layer; costs if measured.

    Parameters
    ----------
    found : SuperExperts
        What :func:`moecollab.super_experts` returned.
    """
    columns = 1 if found.effects is None else 2
    titles = ("largest output of each expert, largest hidden state", "loss added, nats a token")
    figure = make_subplots(
        rows=1, cols=columns, subplot_titles=titles[:columns], horizontal_spacing=0.2
    )
    for kind, name, color, size in KINDS:
        figure.add_trace(
            _dots(found.experts.filter(pl.col("kind") == kind), name, color, size), 1, 1
        )
    hidden = found.hidden.filter(pl.col("layer") >= 0)
    line = go.Scatter(
        x=hidden["layer"].to_list(),
        y=hidden["max_abs"].to_list(),
        name="hidden state",
        mode="lines",
        line={"color": INK, "width": 1},
        hovertemplate="after layer %{x}: %{y:.4g}<extra></extra>",
    )
    figure.add_trace(line, 1, 1)
    figure.update_yaxes(type="log", row=1, col=1)
    if found.effects is not None:
        figure.add_trace(_costs(found.effects), 1, 2)
        figure.update_yaxes(type="category", autorange="reversed", row=1, col=2)
    figure.update_annotations(font={"size": 13})
    figure = styled(figure, height=420)
    figure.update_xaxes(title_text="layer", row=1, col=1)
    return figure.update_layout(legend={"orientation": "h", "y": -0.2}, margin={"t": 40})


def _dots(rows: pl.DataFrame, name: str, color: str, size: int) -> go.Scatter:
    shown = rows.filter(pl.col("value") > 0)
    names = ["shared" if expert < 0 else f"expert {expert}" for expert in shown["expert"]]
    told = list(zip(names, shown["position"], map(escape, shown["token"]), strict=True))
    return go.Scatter(
        x=shown["layer"].to_list(),
        y=shown["value"].to_list(),
        customdata=told,
        name=name,
        mode="markers",
        marker={"color": color, "size": size, "opacity": 0.75},
        hovertemplate="layer %{x} %{customdata[0]}: %{y:.4g}<br>at position %{customdata[1]}, "
        "“%{customdata[2]}”<extra></extra>",
    )


def _costs(effects: pl.DataFrame) -> go.Bar:
    """Loss added by what was taken away; of draws the mean, with the least and the most."""
    rows = effects.filter(pl.col("set") != "none")
    by_set = rows.group_by("set", maintain_order=True).agg(
        pl.col("added").mean(), pl.min("added").alias("least"), pl.max("added").alias("most")
    )
    least, mean, most = (by_set[name] for name in ("least", "added", "most"))
    return go.Bar(
        x=mean.to_list(),
        y=by_set["set"].to_list(),
        orientation="h",
        marker={"color": KEPT},
        error_x={"array": (most - mean).to_list(), "arrayminus": (mean - least).to_list()},
        showlegend=False,
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )
