"""Figures of experts: how much each is used, and how each is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moecollab.reporting.costs import pretty
from moecollab.reporting.drops import Drops
from moecollab.reporting.expert_use import ExpertUse
from moecollab.reporting.figures.style import (
    GONE,
    INK,
    KEPT,
    PAPER,
    SEQUENTIAL,
    WARM,
    colorbar,
    escape,
    layer_axis,
    map_height,
    styled,
)

ALL_TEXT, LEANING = "All text", "How specialised"
SITE = "<b>Layer %{y}, expert %{x}</b><br>"


def use_map(
    use: ExpertUse, dropped: Mapping[int, Sequence[int]], shown: Sequence[str]
) -> go.Figure:
    """Share of each layer's routed weight by expert, with a menu of domains.

    Parameters
    ----------
    use : ExpertUse
        The shares.
    dropped : mapping of layer to expert ids
        Experts to mark as dropped.
    shown : sequence of str
        Domains in the menu.
    """
    domains = tuple(shown) if len(use.domains) > 1 else ()
    views = [use.overall, *(use.by_domain[use.domains.index(name)] for name in domains)]
    top = 100 * max(float(np.quantile(view[use.held], 0.995)) for view in views)
    traces = [_overall_trace(use, top), *(_domain_trace(use, name, top) for name in domains)]
    figure = go.Figure([*traces, _leaning_trace(use)] if domains else traces)
    names = [ALL_TEXT, *domains, LEANING]
    for number, trace in enumerate(figure.data):
        trace.visible = number == 0
    marks = _drop_marks(use, dropped)
    if marks is not None:
        figure.add_trace(marks)
    styled(figure, height=map_height(len(use.layers)) + 96)
    figure.update_xaxes(title_text="expert", range=[-0.5, use.n_experts - 0.5], showgrid=False)
    layer_axis(figure, use.layers)
    figure.update_yaxes(showgrid=False)
    figure.update_layout(
        margin={"t": 58, "b": 44},
        updatemenus=[_menu(names, always=marks is not None)] if domains else [],
    )
    return figure


def _overall_trace(use: ExpertUse, top: float) -> go.Heatmap:
    """The map of all text, which tells what each expert leans to."""
    trace = _site_map(use, 100 * use.overall, ALL_TEXT, colorbar("% of layer"))
    trace.update(zmin=0, zmax=top, colorscale=SEQUENTIAL, text=_leanings(use))
    trace.hovertemplate = f"{SITE}%{{z:.2f}} % of the layer's weight<br>%{{text}}<extra></extra>"
    return trace


def _domain_trace(use: ExpertUse, name: str, top: float) -> go.Heatmap:
    """The map of one domain, beside the average."""
    view = use.by_domain[use.domains.index(name)]
    trace = _site_map(use, 100 * view, escape(name), colorbar("% of layer"))
    trace.update(zmin=0, zmax=top, colorscale=SEQUENTIAL)
    # Numbers rather than a text per cell: a page may hold twenty maps of 15,000 cells.
    ratio = np.divide(view, use.overall, out=np.ones(view.shape), where=use.overall > 0)
    trace.customdata = ratio.astype(np.float32)
    trace.hovertemplate = (
        f"{SITE}%{{z:.2f}} % of the layer's weight in {escape(name)}<br>"
        "%{customdata:.1f}× its average<extra></extra>"
    )
    return trace


def _leaning_trace(use: ExpertUse) -> go.Heatmap:
    """How far each expert leans to its favourite domain."""
    lift = use.lift.max(axis=0)
    trace = _site_map(use, lift, LEANING, colorbar("times average"))
    trace.update(zmin=1, zmax=max(2.0, float(np.quantile(lift[use.held], 0.99))), colorscale=WARM)
    trace.text = _leanings(use)
    trace.hovertemplate = f"{SITE}%{{text}}<extra></extra>"
    return trace


def _site_map(
    use: ExpertUse, values: NDArray[np.float64], name: str, bar: dict[str, object]
) -> go.Heatmap:
    return go.Heatmap(
        z=np.where(use.held, values, np.nan).astype(np.float32),
        x=list(range(use.n_experts)),
        y=[str(layer) for layer in use.layers],
        xgap=_gap(use.n_experts),
        ygap=_gap(use.n_experts),
        colorbar=bar,
        name=name,
    )


def _gap(n_experts: int) -> int:
    """Pixels between cells; none where cells are only a few pixels wide."""
    return 1 if n_experts <= 96 else 0


def _leanings(use: ExpertUse) -> list[list[str]]:
    """What each expert leans to, in words; escaped."""
    if len(use.domains) < 2:
        return [[""] * use.n_experts for _ in use.layers]
    return [[_leaning(use, row, expert) for expert in range(use.n_experts)] for row in _rows(use)]


def _rows(use: ExpertUse) -> range:
    return range(len(use.layers))


def _leaning(use: ExpertUse, row: int, expert: int) -> str:
    home = int(use.leaning[row, expert])
    if home < 0:
        return "chosen too rarely to lean to a domain"
    name = escape(use.domains[home])
    return f"leans to {name}: {use.lift[home, row, expert]:.1f}× its average"


def _drop_marks(use: ExpertUse, dropped: Mapping[int, Sequence[int]]) -> go.Scatter | None:
    sites = [
        (expert, row) for row, layer in enumerate(use.layers) for expert in dropped.get(layer, ())
    ]
    if not sites:
        return None
    return go.Scatter(
        x=[expert for expert, _ in sites],
        y=[str(use.layers[row]) for _, row in sites],
        mode="markers",
        marker={
            "symbol": "x-thin",
            "size": 7 if use.n_experts <= 40 else 5,
            "line": {"width": 1.5 if use.n_experts <= 40 else 1.1, "color": GONE},
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _menu(names: Sequence[str], *, always: bool) -> dict[str, object]:
    """A menu that shows one trace of several (and the last one always, if asked)."""
    buttons = [
        {
            "label": escape(name),
            "method": "update",
            "args": [
                {"visible": [other == number for other in range(len(names))] + [True] * always}
            ],
        }
        for number, name in enumerate(names)
    ]
    return {
        "buttons": buttons,
        "type": "dropdown",
        "direction": "down",
        "showactive": True,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 14, "l": 0},
        "bgcolor": PAPER,
        "bordercolor": "#b9c2cc",
        "font": {"size": 13, "color": INK},
    }


def score_strip(drops: Drops) -> go.Figure:
    """One dot per expert along its score, a row per layer; dropped ones stand out."""
    figure = go.Figure()
    kinds = (("kept", drops.stays, KEPT, "circle", 0.75), ("dropped", drops.gone, GONE, "x", 1.0))
    for name, which, colour, symbol, opacity in kinds:
        rows, experts = np.nonzero(which)
        figure.add_trace(
            go.Scatter(
                x=drops.scores[rows, experts],
                y=[str(drops.layers[row]) for row in rows],
                mode="markers",
                name=name,
                text=[drops.note(int(row), int(expert)) for row, expert in np.argwhere(which)],
                hovertemplate="%{text}<extra></extra>",
                marker={"color": colour, "symbol": symbol, "size": 7, "opacity": opacity},
            )
        )
    styled(figure, height=map_height(len(drops.layers)) + 110)
    figure.update_xaxes(title_text=f"{escape(pretty(drops.criterion))} score; low goes first")
    layer_axis(figure, drops.layers)
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}, margin={"t": 40}
    )
    return figure
