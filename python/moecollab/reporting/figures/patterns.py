"""Figures of collaboration patterns and of the fit that found them."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moecollab.reporting.figures.style import (
    INK,
    KEPT,
    QUIET,
    RULE,
    axis_label,
    colorbar,
    escape,
    styled,
)
from moecollab.reporting.history import FitHistory
from moecollab.reporting.pattern_cards import PatternMap

AROUND_CHANCE = ["#d2cabf", "#e6e1da", "#ffffff", "#7fb4d8", "#0b3f70"]
"""Grey below chance, white at chance, blue above it."""


def pattern_map(found: PatternMap) -> go.Figure:
    """How much more than chance each pattern is used in each domain.

    Rows are patterns, columns domains; colour is the base-2 logarithm of the ratio.
    """
    with np.errstate(divide="ignore"):
        shade = np.clip(np.log2(found.lift), -2, 2)
    notes = [
        [_pattern_note(found, row, column) for column in range(len(found.domains))]
        for row in range(len(found.names))
    ]
    figure = go.Figure(
        go.Heatmap(
            z=shade.astype(np.float32),
            x=[axis_label(name) for name in found.domains],
            y=list(found.names),
            zmin=-2,
            zmax=2,
            colorscale=AROUND_CHANCE,
            xgap=2,
            ygap=2,
            text=notes,
            hovertemplate="%{text}<extra></extra>",
            colorbar=colorbar("vs. chance")
            | {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["≤ ¼×", "½×", "1×", "2×", "≥ 4×"]},
        )
    )
    styled(figure, height=72 + 20 * len(found.names))
    figure.update_xaxes(side="top", tickangle=-35 if len(found.domains) > 9 else 0, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_layout(margin={"t": 60, "l": 48, "b": 6})
    return figure


def _pattern_note(found: PatternMap, row: int, column: int) -> str:
    return (
        f"<b>Group {found.names[row]} in {escape(found.domains[column])}</b><br>"
        f"{100 * found.share[row, column]:.1f} % of the group's use, "
        f"{found.lift[row, column]:.1f}× chance"
    )


def objective_curve(history: FitHistory) -> go.Figure:
    """The objective of the fit and its terms, round by round; stages are marked."""
    figure = go.Figure()
    colours, dashes = (INK, KEPT, "#c58a00", "#8b5fa8"), ("solid", "dot", "dash", "dashdot")
    for curve, colour, dash in zip(history.curves, colours, dashes, strict=True):
        figure.add_trace(
            go.Scatter(
                x=list(history.rounds),
                y=list(curve.values),
                mode="lines+markers",
                marker={"size": 4},
                name=escape(curve.name),
                line={"color": colour, "dash": dash, "width": 2},
                hovertemplate="%{fullData.name}: %{y:.5g}<extra></extra>",
            )
        )
    styled(figure, height=340)
    for start, stage in history.stages:
        figure.add_vline(
            x=start,
            line={"color": RULE, "width": 1},
            annotation={
                "text": escape(stage),
                "textangle": -90,
                "font": {"color": QUIET, "size": 11},
            },
            annotation_position="top left",
        )
    last = max(number for number in history.rounds if number is not None)
    figure.update_xaxes(title_text="round of the fit", showgrid=False, range=[0, last + 0.5])
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        hovermode="x unified",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"t": 40},
    )
    return figure
