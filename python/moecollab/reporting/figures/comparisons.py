"""Figure of a comparison: what each criterion's cuts cost, over the share that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from moecollab.reporting.figures.style import QUIET, escape, styled
from moecollab.reporting.numbers import percent

if TYPE_CHECKING:
    from moecollab.evaluation.comparing.comparison import Comparison

CONTROL = "random"
APART = 0.0015
"""Distance of the criteria's points on the axis of shares."""
COLORS = qualitative.T10
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")
BUDGETS = {"layer": "the same share in each layer", "model": "the share over the whole model"}


def comparison_figure(comparison: Comparison, measure: str = "loss") -> go.Figure:
    """Cost against the share that goes: a panel per budget and a line per criterion.

    Bars are 95 % intervals over seeds and documents, beside each other where they would overlap.
    Criteria can be switched off in the legend. The random control may leave the panel at the top,
    so that the others can be told apart.

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
    for column, per in enumerate(budgets, start=1):
        for number, name in enumerate(names):
            own = table.filter(per=per, criterion=name).sort("drop")
            line = _line(own, escape(name), number, len(names), shown=column == 1)
            figure.add_trace(line, row=1, col=column)
    drops = table["drop"].unique().sort().to_list()
    figure.update_xaxes(
        title_text="share of experts dropped",
        tickvals=drops,
        ticktext=[percent(drop) for drop in drops],
        range=[min(drops) - 0.05, max(drops) + 0.05],
    )
    unit = "nats a token" if measure == "loss" else "share of questions"
    figure.update_yaxes(title_text=f"cost, {unit}", col=1)
    figure.update_yaxes(range=_range(table))
    return styled(figure, height=480).update_layout(margin={"t": 48}, hoverdistance=40)


def _range(table: pl.DataFrame) -> list[float]:
    """Ends of the cost axis: all but the random control is within, and 0."""
    judged = table.filter(pl.col("criterion") != CONTROL)
    shown = judged if judged.height else table
    ends = [0.0, *shown["low"].to_list(), *shown["high"].to_list()]
    edge = 0.05 * (max(ends) - min(ends)) or 1.0
    return [min(ends) - edge, max(ends) + edge]


def _line(own: pl.DataFrame, name: str, number: int, of: int, *, shown: bool) -> go.Scatter:
    cost, drops = own["cost"].to_numpy(), own["drop"].to_numpy()
    control = name == CONTROL
    return go.Scatter(
        x=(drops + APART * (number - (of - 1) / 2)).tolist(),
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
        line={
            "color": QUIET if control else COLORS[number % len(COLORS)],
            "width": 1.5,
            "dash": "dot" if control else "solid",
        },
        marker={"symbol": SYMBOLS[number // len(COLORS) % len(SYMBOLS)], "size": 7},
        text=[percent(drop) for drop in drops],
        hovertemplate=f"{name}<br>%{{text}} dropped: %{{y:.4f}}<extra></extra>",
    )
