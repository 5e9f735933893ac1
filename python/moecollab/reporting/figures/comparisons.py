"""Figure of a comparison: what each criterion's cuts cost, over the share that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from moecollab.reporting.figures.style import escape, styled
from moecollab.reporting.numbers import percent

if TYPE_CHECKING:
    import polars as pl

    from moecollab.evaluation.comparing.comparison import Comparison

BUDGETS = {"layer": "the same share in each layer", "model": "the share over the whole model"}


def comparison_figure(comparison: Comparison, measure: str = "loss") -> go.Figure:
    """Cost against the share that goes: a panel per budget and a line per criterion.

    Bars are 95 % intervals over seeds and documents. Criteria can be switched off in the legend.

    Parameters
    ----------
    comparison : Comparison
        What ``compare`` returned.
    measure : str
        One of its measures.
    """
    table = comparison.standings(measure)
    budgets = table["per"].unique(maintain_order=True).to_list()
    figure = make_subplots(
        rows=1,
        cols=len(budgets),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[BUDGETS[per] for per in budgets],
    )
    names = comparison.cells["criterion"].unique(maintain_order=True).to_list()
    colors = qualitative.Dark24
    for column, per in enumerate(budgets, start=1):
        for number, name in enumerate(names):
            own = table.filter(per=per, criterion=name).sort("drop")
            line = _line(own, escape(name), colors[number % len(colors)], shown=column == 1)
            figure.add_trace(line, row=1, col=column)
    drops = table["drop"].unique().sort().to_list()
    figure.update_xaxes(
        title_text="share of experts dropped",
        tickvals=drops,
        ticktext=[percent(drop) for drop in drops],
        range=[min(drops) - 0.05, max(drops) + 0.05],
    )
    unit = "nats a token" if measure == "loss" else "share of questions"
    figure.update_yaxes(title_text=f"cost, {unit}", col=1, rangemode="tozero")
    return styled(figure, height=480).update_layout(margin={"t": 48}, hoverdistance=40)


def _line(own: pl.DataFrame, name: str, color: str, *, shown: bool) -> go.Scatter:
    cost = own["cost"].to_numpy()
    return go.Scatter(
        x=own["drop"].to_list(),
        y=cost.tolist(),
        error_y={
            "type": "data",
            "array": (own["high"].to_numpy() - cost).tolist(),
            "arrayminus": (cost - own["low"].to_numpy()).tolist(),
            "thickness": 1,
            "width": 2,
        },
        name=name,
        legendgroup=name,
        showlegend=shown,
        mode="lines+markers",
        line={"color": color, "width": 1.5},
        hovertemplate=f"{name}<br>%{{x:.1%}} dropped: %{{y:.4f}}<extra></extra>",
    )
