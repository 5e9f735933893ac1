"""The looks that all figures share, and how a figure becomes a piece of the page."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html

INK, QUIET, RULE, PAPER = "#1f2733", "#5b6675", "#dfe4ea", "#ffffff"
KEPT, GONE = "#2f6f9f", "#d1550b"
SEQUENTIAL = ["#f3f6f9", "#cfe1ee", "#93bfdc", "#4a90bf", "#1f6298", "#0b3560"]
WARM = ["#fbf7f2", "#f6dcb9", "#eeb06a", "#d97b26", "#a34a0b", "#5f2605"]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def escape(text: str) -> str:
    """Text that a figure shows as it is; figures read some HTML, but know no entity for quotes."""
    return html.escape(text, quote=False)


def as_html(figure: go.Figure, name: str) -> str:
    """The figure as a piece of a page that holds plotly.js already."""
    return str(
        to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=name,
            config={"displayModeBar": False, "displaylogo": False, "responsive": True},
        )
    )


def plotly_script() -> str:
    """The source of plotly.js, to be put into a page once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def styled(figure: go.Figure, height: float) -> go.Figure:
    """The figure with fonts, colours, margins and no zooming."""
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 8, "t": 16, "b": 44},
        hoverlabel={
            "bgcolor": PAPER,
            "bordercolor": "#9aa5b1",
            "font": {"family": FONT, "size": 13, "color": INK},
            "align": "left",
        },
        dragmode=False,
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            gridcolor=RULE,
            zeroline=False,
            fixedrange=True,
            automargin=True,
            ticks="",
            title_font={"size": 13, "color": QUIET},
        )
    return figure


def layer_axis(figure: go.Figure, layers: Sequence[int]) -> None:
    """The first layer on top, labelled by the model's own index; every few if there are many."""
    figure.update_yaxes(
        title_text="layer",
        type="category",
        categoryorder="array",
        categoryarray=[str(layer) for layer in layers],
        dtick=max(1, round(len(layers) / 14)),
        range=[len(layers) - 0.5, -0.5],
    )


def map_height(n_layers: int) -> int:
    """Pixels for a map with a row per layer."""
    return int(np.clip(28 * n_layers, 200, 560))


def axis_label(name: str) -> str:
    """A domain's name, broken at a space in the middle if it is long."""
    words = name.split()
    if len(name) <= 12 or len(words) < 2:
        return escape(name)
    best = min(
        range(1, len(words)),
        key=lambda at: abs(len(" ".join(words[:at])) - len(" ".join(words[at:]))),
    )
    return f"{escape(' '.join(words[:best]))}<br>{escape(' '.join(words[best:]))}"


def colorbar(title: str) -> dict[str, object]:
    """A thin colour bar with a title above."""
    return {
        "title": {"text": f"{title}<br> ", "font": {"size": 12}, "side": "top"},
        "thickness": 10,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "xpad": 6,
    }
