"""Figures of what dropping experts costs."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moecollab.reporting.costs import Cost, Costs
from moecollab.reporting.figures.style import GONE, KEPT, QUIET, axis_label, escape, styled

DEARER = ["#2f76ad", "#bcd8ea", "#ffffff", "#f8d9b3", "#e9964c"]
"""Blue where loss falls, white at no change, orange where it rises."""


def cost_dots(costs: Costs, chosen: str | None = None) -> go.Figure:
    """Loss added by each plan with its interval: a panel per fraction, the cheapest on top.

    The criterion that is chosen stands out, and chance stays in the background.
    """
    groups = costs.groups
    figure = _panels(groups, gap=54, row=30)
    for panel, (_, rows) in enumerate(groups, start=1):
        for cost in rows:
            figure.add_trace(_cost_dot(cost, chosen), row=panel, col=1)
        figure.add_vline(x=0, line={"color": QUIET, "width": 1}, row=panel, col=1)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title_text="added loss, nats per token", row=len(groups), col=1)
    figure.update_layout(hoverdistance=60, showlegend=False, margin={"l": 92, "t": 30})
    return figure


def _panels(groups: tuple[tuple[str, tuple[Cost, ...]], ...], gap: int, row: int) -> go.Figure:
    """Panels above each other, as high as they have rows, titled on the left."""
    sizes = [len(rows) for _, rows in groups]
    height = gap * len(groups) + row * sum(sizes) + 50
    figure = make_subplots(
        rows=len(groups),
        cols=1,
        shared_xaxes=True,
        row_heights=sizes,
        vertical_spacing=gap / height if len(groups) > 1 else 0,
        subplot_titles=[f"<b>{escape(title)}</b>" for title, _ in groups],
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 13}, yshift=4)
    return styled(figure, height=height)


def _cost_dot(cost: Cost, chosen: str | None) -> go.Scatter:
    ours, chance = cost.criterion == chosen, cost.criterion == "random"
    return go.Scatter(
        x=[cost.difference],
        y=[escape(cost.short)],
        mode="markers",
        marker={
            "color": GONE if ours else QUIET if chance else KEPT,
            "size": 11,
            "symbol": "diamond" if ours else "circle-open" if chance else "circle",
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [0 if cost.high is None else cost.high - cost.difference],
            "arrayminus": [0 if cost.low is None else cost.difference - cost.low],
            "thickness": 2,
            "width": 5,
        },
        text=[f"<b>{escape(cost.label)}</b><br>{cost.words}"],
        hovertemplate="%{text}<extra></extra>",
    )


def cost_map(costs: Costs) -> go.Figure:
    """Loss added in each domain: a panel per fraction, a row per plan, values in the cells."""
    groups = costs.groups
    figure = _panels(groups, gap=34, row=30)
    cells = {(cost.name, cost.domain): cost for cost in costs.by_domain}
    for panel, (_, rows) in enumerate(groups, start=1):
        table = [[cells[plan.name, name] for name in costs.domains] for plan in rows]
        figure.add_trace(_domain_cells(costs, rows, table), row=panel, col=1)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-40 if len(costs.domains) > 9 else 0)
    figure.update_layout(margin={"l": 92, "t": 30, "b": 44})
    return figure


def _domain_cells(costs: Costs, rows: tuple[Cost, ...], table: list[list[Cost]]) -> go.Heatmap:
    values = [[cost.difference for cost in row] for row in table]
    # The random control may be far worse than all others and would wash out their colours.
    judged = [row for row in table if row[0].criterion != "random"] or table
    top = max(0.01, max(abs(cost.difference) for row in judged for cost in row))
    return go.Heatmap(
        z=values,
        x=[axis_label(name) for name in costs.domains],
        y=[escape(cost.short) for cost in rows],
        zmin=-top,
        zmax=top,
        colorscale=DEARER,
        xgap=2,
        ygap=2,
        text=[[_cost_note(cost) for cost in row] for row in table],
        texttemplate="%{z:+.2f}" if len(costs.domains) <= 14 else None,
        textfont={"size": 11.5},
        hovertemplate="%{text}<extra></extra>",
        showscale=False,
    )


def _cost_note(cost: Cost) -> str:
    where = escape(cost.domain or "all text")
    return f"<b>{escape(cost.label)}, {where}</b><br>{cost.words}<br>{cost.documents} texts"
