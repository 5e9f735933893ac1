"""The page of a comparison: what each criterion's cuts cost, readable without anything else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from moecollab.evaluation.comparing.comparison import LOSS, Comparison, load_comparison
from moecollab.evaluation.comparing.measuring import FULL
from moecollab.manifest import refuse_existing, write_bytes
from moecollab.patterns.dictionary import HSDL
from moecollab.reporting.figures.comparisons import BUDGETS, comparison_figure
from moecollab.reporting.figures.style import as_html, plotly_script
from moecollab.reporting.material import FilePath
from moecollab.reporting.numbers import Ledger, Number, percent, sentence
from moecollab.reporting.provenance import option
from moecollab.reporting.templating import script_json, template

PLACES = {"layer": "of each layer", "model": "of the whole model"}


@dataclass(frozen=True)
class Table:
    """The criteria at one budget and share, the cheapest first, beside the one that is held."""

    key: str
    per: str
    drop: float
    held: str
    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """How much goes, and of what."""
        return f"{percent(self.drop)} {PLACES[self.per]}"

    def level(self, row: Mapping[str, Any]) -> bool:
        """Whether a criterion is the reference, or not told apart from it."""
        return bool(row["difference_low"] <= 0 <= row["difference_high"])


@dataclass(frozen=True)
class Part:
    """Everything about one measure."""

    key: str
    measure: str
    figure: Markup
    tables: list[Table]
    notes: list[str]

    @property
    def loss(self) -> bool:
        """Whether it is the loss, and no task."""
        return self.measure == LOSS

    def number(self, ledger: Ledger, key: str, value: float) -> Number:
        """A cost: nats, or a share of the questions."""
        style = ledger.change if self.loss else ledger.share
        return style(f"{self.key}.{key}", value)


def comparison_page(
    comparison: Comparison | FilePath,
    out: FilePath,
    *,
    reference: str | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """The path of one HTML page that shows a comparison; it needs no network.

    Parameters
    ----------
    comparison : Comparison or path
        What ``compare`` returned, or its folder.
    out : path
        The page.
    reference : str, optional
        Criterion that the others are held against; the best of each budget if not given.
    title : str, optional
        Headline of the page.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    OutputExistsError
        When the page is there and `overwrite` is not given.
    """
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    found = comparison if isinstance(comparison, Comparison) else load_comparison(comparison)
    write_bytes(target, render(found, reference, title).encode(), overwrite=overwrite)
    return target


def render(found: Comparison, reference: str | None = None, title: str | None = None) -> str:
    """The page as text."""
    ledger = Ledger()
    parts = [_part(found, measure, reference) for measure in found.measures]
    model = found.about.get("measured", {}).get("model", {})
    name = _model_name(model)
    return template("comparison.html.j2").render(
        title=title or f"What each criterion's cuts cost{f': {name}' if name else ''}",
        found=found,
        model=model,
        calibration=found.about.get("measured", {}).get("calibration", {}),
        held_out=_held_out(found),
        parts=parts,
        findings=[_finding(parts[0], table, ledger) for table in parts[0].tables],
        reference=reference,
        command=_command(found.about),
        fits=_fits(found.about),
        about=found.about,
        n=ledger,
        numbers=lambda: script_json(ledger.values),
        plotly=Markup(plotly_script()),
    )


def _model_name(model: Mapping[str, Any]) -> str:
    """Last part of the model's path; its family where that says nothing."""
    name = Path(str(model.get("path") or "")).name
    return str(model.get("model_type", "")) if name in ("", "model", "checkpoint") else name


def _held_out(found: Comparison) -> dict[str, int]:
    """Size of the text that judged."""
    full = found.values.filter(cut=FULL, measure=LOSS)
    tokens = int(full["size"].sum())
    return {"documents": full.height, "tokens": tokens, "domains": full["domain"].n_unique()}


def _part(found: Comparison, measure: str, reference: str | None) -> Part:
    number = found.measures.index(measure)
    key = LOSS if measure == LOSS else f"task{number}"
    standings = found.standings(measure, reference=reference)
    tables = []
    for (per, drop), part in standings.group_by("per", "drop", maintain_order=True):
        rows, where, share = part.to_dicts(), str(per), float(str(drop))
        held = reference or str(rows[0]["criterion"])
        tables.append(Table(f"{where}.{share:g}", where, share, held, rows))
    # Plotly escapes <, > and / in its JSON; our figures escape what they show.
    figure = Markup(as_html(comparison_figure(found, measure), f"fig-{key}"))
    tables.sort(key=lambda table: (list(BUDGETS).index(table.per), table.drop))
    return Part(key, measure, figure, tables, found.notes(measure))


def _finding(part: Part, table: Table, ledger: Ledger) -> Markup:
    """Which criterion costs least at one budget and share, and which are level with it."""
    best = table.rows[0]
    key = f"{table.key}.{best['criterion']}"
    ends = [part.number(ledger, f"{key}.{end}", best[end]) for end in ("low", "high")]
    cost = part.number(ledger, f"{key}.cost", best["cost"])
    said = sentence(
        "Dropping {}: <b>{}</b> costs least, {} nats a token [{}, {}].",
        table.title,
        best["criterion"],
        cost,
        *ends,
    )
    if table.held != best["criterion"] or len(table.rows) < 2:
        return said
    level = [row["criterion"] for row in table.rows[1:] if table.level(row)]
    words = f"Not told apart from it: {', '.join(level)}" if level else "All others cost more"
    if len(level) == len(table.rows) - 1:
        words = "No other is told apart from it"
    return said + sentence(" <small>{}.</small>", words)


def _command(about: Mapping[str, Any]) -> str:
    """The command that repeats it; texts are for the reader to fill in."""
    settings, measured = about.get("settings", {}), about.get("measured", {})
    model = shlex.quote(str(measured.get("model", {}).get("path") or "MODEL"))
    said = [f"moecollab compare {model} CALIBRATION --held-out HELD_OUT"]
    for name in ("criteria", "drops", "per"):
        if settings.get(name):
            said.append(option(name, ",".join(map(str, settings[name]))))
    said += [option("tasks", task) for task in settings.get("tasks", [])]
    named = settings | {name: measured.get(name) for name in ("task_folder", "dtype")}
    single = ("task_folder", "seeds", "share", "limit", "probe_tokens", "context", "batch_size")
    said += [option(name, named[name]) for name in (*single, "dtype") if named.get(name)]
    said += ["--fits fits.yaml"] if _fits(about) else []
    return " \\\n    ".join([*said, "--out run/comparison"])


def _fits(about: Mapping[str, Any]) -> str:
    """The file of fits that repeats it; empty where the only fit is the default."""
    fits, first = about.get("settings", {}).get("fits", {}), about.get("measured", {}).get("fit")
    plain = HSDL().get_params()
    told = {
        name: {key: value for key, value in fits[name].items() if _other(plain.get(key), value)}
        for name in sorted(fits, key=lambda name: name != first)
    }
    if all(not changed for changed in told.values()) and len(told) < 2:
        return ""
    return str(yaml.safe_dump(told, sort_keys=False, default_flow_style=None))


def _other(plain: object, value: object) -> bool:
    return value != (list(plain) if isinstance(plain, tuple) else plain)
