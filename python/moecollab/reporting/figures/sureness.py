"""Figures of how sure a choice is, and of how far criteria agree."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moecollab.reporting.costs import pretty
from moecollab.reporting.figures.style import (
    INK,
    SEQUENTIAL,
    colorbar,
    escape,
    layer_axis,
    map_height,
    styled,
)
from moecollab.reporting.sureness import Agreement, Sureness

STAY_OR_GO = [
    [0.0, "#d1550b"],
    [0.05, "#e08a55"],
    [0.5, "#f6efe2"],
    [0.95, "#6f9fc4"],
    [1.0, "#2f6f9f"],
]
"""Sure to go, open, sure to stay."""
MOST_NAMED = 40
"""Experts of a layer, or criteria, up to which cells are labelled."""


def sureness_map(sure: Sureness) -> go.Figure:
    """How often draws keep each expert, the surest of each layer first, and where the cut is."""
    scores, spread, order = sure.scores, sure.spread, sure.order
    shown = np.where(scores.present, spread.kept_probability, np.nan)
    probability, value, low, high = (
        np.take_along_axis(array, order, axis=1)
        for array in (shown, scores.values, spread.low, spread.high)
    )
    gap = 1 if scores.n_experts <= 96 else 0
    trace = go.Heatmap(
        z=100 * probability,
        x=list(range(1, scores.n_experts + 1)),
        y=[str(layer) for layer in scores.layers],
        zmin=0,
        zmax=100,
        colorscale=STAY_OR_GO,
        colorbar=colorbar("% of draws<br>that keep it"),
        customdata=np.stack([order, value, low, high], axis=2),
        text=order if scores.n_experts <= MOST_NAMED else None,
        texttemplate="%{text}" if scores.n_experts <= MOST_NAMED else None,
        textfont={"size": 11},
        xgap=gap,
        ygap=gap,
        hovertemplate=(
            "<b>Layer %{y}, expert %{customdata[0]}</b><br>%{z:.0f} % of draws keep it<br>"
            "score %{customdata[1]:.4g} (%{customdata[2]:.4g} to %{customdata[3]:.4g})"
            "<extra></extra>"
        ),
    )
    figure = styled(go.Figure(trace), height=map_height(scores.n_layers) + 76)
    figure.update_xaxes(
        title_text="place within the layer, the surest to stay first",
        range=[0.5, scores.n_experts + 0.5],
        showgrid=False,
    )
    layer_axis(figure, scores.layers)
    figure.update_yaxes(showgrid=False)
    figure.add_shape(type="path", path=_cut(sure), line={"color": INK, "width": 2})
    return figure


def _cut(sure: Sureness) -> str:
    """A path between what the budget keeps and drops of all documents, in places and rows."""
    edges = np.repeat(sure.n_kept + 0.5, 2)
    rows = np.repeat(np.arange(sure.scores.n_layers + 1), 2)[1:-1] - 0.5
    steps = zip(edges.tolist(), rows.tolist(), strict=True)
    return "M" + " L".join(f"{edge:g},{row:g}" for edge, row in steps)


def agreement_map(found: Agreement) -> go.Figure:
    """How many of the experts that either of two criteria keeps both keep; palest is chance."""
    table = found.table
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    place = {name: number for number, name in enumerate(names)}
    shared = np.full((len(names), len(names)), np.nan)
    ranks = np.full(shared.shape, np.nan)
    for row in table.iter_rows(named=True):
        one, other = place[row["first"]], place[row["second"]]
        shared[[one, other], [other, one]] = 100 * row["jaccard"]
        if row["spearman"] is not None:
            ranks[[one, other], [other, one]] = row["spearman"]
    labels = [escape(pretty(name)) for name in names]
    trace = go.Heatmap(
        z=shared,
        x=labels,
        y=labels,
        zmin=100 * found.chance,
        zmax=100,
        colorscale=SEQUENTIAL,
        colorbar=colorbar("% in common"),
        customdata=ranks,
        texttemplate="%{z:.0f}" if len(names) <= MOST_NAMED // 2 else None,
        xgap=1,
        ygap=1,
        hovertemplate=(
            "<b>%{y} and %{x}</b><br>%{z:.1f} % of the experts that either keeps<br>"
            "rank correlation %{customdata:.2f}<extra></extra>"
        ),
    )
    figure = styled(go.Figure(trace), height=120 + 34 * len(names))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-40 if len(names) > 8 else 0)
    return figure
