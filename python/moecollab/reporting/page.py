"""The report: one HTML page that shows what was found, and works without a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from moecollab import criteria
from moecollab.errors import MoeCollabError
from moecollab.manifest import refuse_existing, write_bytes
from moecollab.patterns.collaboration import Collaboration
from moecollab.pruning.plans import Plan
from moecollab.record.activations import Activations
from moecollab.reporting import provenance
from moecollab.reporting.costs import Costs, costs_of, pretty
from moecollab.reporting.drops import Drops, drops_of
from moecollab.reporting.expert_use import ExpertUse, expert_use, shown_domains, token_shares
from moecollab.reporting.figures.costs import cost_dots, cost_map
from moecollab.reporting.figures.experts import score_strip, use_map
from moecollab.reporting.figures.patterns import objective_curve, pattern_map
from moecollab.reporting.figures.style import as_html, plotly_script
from moecollab.reporting.figures.sureness import agreement_map, sureness_map
from moecollab.reporting.findings import cost_findings, pattern_finding, use_finding
from moecollab.reporting.history import fit_history
from moecollab.reporting.levels import LevelView, level_views
from moecollab.reporting.material import (
    FilePath,
    GivenEvaluations,
    GivenScores,
    Material,
    gather,
)
from moecollab.reporting.numbers import Ledger
from moecollab.reporting.pattern_cards import membership
from moecollab.reporting.sureness import Agreement, Sureness, agreement_of, sureness_of
from moecollab.reporting.templating import script_json, template
from moecollab.reporting.trials import Trials, trials_of

MOST_DOMAINS = 24
"""Domains that maps show; more cannot be told apart."""
MOST_ROWS = 200
"""Rows of the table of dropped experts."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What the template reads."""

    title: str
    material: Material
    use: ExpertUse | None
    levels: tuple[LevelView, ...]
    drops: Drops | None
    costs: Costs | None
    trials: Trials | None
    token_shares: dict[str, float]
    sureness: tuple[Sureness, ...] = ()
    agreement: Agreement | None = None
    shown: tuple[str, ...] = ()
    findings: tuple[Markup, ...] = ()
    figures: dict[str, Markup] = field(default_factory=dict)


def report(  # noqa: PLR0913 (one parameter per option of the command)
    out: FilePath,
    *,
    run: FilePath | None = None,
    activations: Activations | FilePath | None = None,
    collaboration: Collaboration | FilePath | None = None,
    scores: GivenScores | None = None,
    plan: Plan | FilePath | None = None,
    evaluations: GivenEvaluations | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """The path of one HTML page that shows what was found; it needs no network.

    Parameters
    ----------
    out : path
        The page.
    run : path, optional
        Folder to find in what is not given: ``activations/``, ``collaboration/``,
        ``scores/*.parquet``, ``plan.json`` (or ``plans/*.json``), ``evaluations/*.json``.
    activations, collaboration, plan : object or path, optional
        Results to show.
    scores : Scores or path, or several, optional
        Scores to show.
    evaluations : mapping of name to Evaluation or path, or a folder, or several, optional
        Evaluations to compare; the full model is the one called "full", or else the only one
        without a plan. Names such as ``caep-25`` tell criterion and percentage.
    title : str, optional
        Headline of the page.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    MissingInputError
        When there is nothing to show.
    StaleInputError
        When parts were made from other activations than those given.
    """
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    material = gather(
        run,
        activations=activations,
        collaboration=collaboration,
        scores=scores,
        plan=plan,
        evaluations=evaluations,
    )
    write_bytes(target, render(material, title).encode(), overwrite=overwrite)
    return target


def render(material: Material, title: str | None = None) -> str:
    """The page as text."""
    ledger = Ledger()
    view = _view(material, title, ledger)
    return template("report.html.j2").render(
        view=view,
        n=ledger,
        numbers=lambda: script_json(ledger.values),
        plotly=Markup(plotly_script()),
        same_text=provenance.same_text(material),
        made=provenance.made(material),
        versions=provenance.versions(material),
        commands=provenance.commands(material),
        criterion_line=_criterion_line,
        pretty=pretty,
        most_rows=MOST_ROWS,
    )


def _view(material: Material, title: str | None, ledger: Ledger) -> View:
    acts, collab, plan = material.activations, material.collaboration, material.plan
    use = None if acts is None else expert_use(acts)
    shares = {} if acts is None else token_shares(acts)
    levels = () if collab is None or acts is None else level_views(collab, acts)
    member = {} if collab is None else membership(collab)
    view = View(
        title=title or _title(material),
        material=material,
        use=use,
        levels=levels,
        drops=None if plan is None else drops_of(plan, material.scores, use, member),
        costs=costs_of(material.evaluations),
        trials=trials_of(material.evaluations),
        token_shares=shares,
        sureness=sureness_of(material.scores, plan),
        agreement=agreement_of(material.scores, plan),
        shown=shown_domains(tuple(shares), shares, MOST_DOMAINS),
    )
    view.figures.update(_figures(view))
    return _with_findings(view, ledger)


def _title(material: Material) -> str:
    if material.activations is None:
        return "Expert collaboration"
    about = material.activations.manifest["model"]
    name = Path(str(about.get("path") or "")).name
    # A folder called "model" says nothing; the family at least says what it is.
    named = name if name not in ("", "model", "checkpoint") else about["model_type"]
    return f"How the experts of {named} work together"


def _with_findings(view: View, ledger: Ledger) -> View:
    found: list[Markup] = []
    if view.costs is not None:
        found += cost_findings(view.costs, view.material.evaluations, ledger, _chosen(view))
    if view.levels:
        found.append(pattern_finding(view.levels[0], ledger))
    if view.use is not None:
        found.append(use_finding(view.use, view.drops, ledger))
    return replace(view, findings=tuple(found))


def _chosen(view: View) -> str | None:
    """Criterion of the plan that the page is about."""
    plan = view.material.plan
    return None if plan is None else plan.criterion


def _figures(view: View) -> dict[str, Markup]:
    """The figures that can be drawn, as HTML."""
    drawn = {}
    plan, collab = view.material.plan, view.material.collaboration
    if view.use is not None:
        drawn["use"] = use_map(view.use, {} if plan is None else plan.dropped, view.shown)
    for level in view.levels:
        if len(view.shown) > 1 and level.cards:
            drawn[f"patterns-{level.level}"] = pattern_map(level.by_domain(view.shown))
    if view.drops is not None:
        drawn["scores"] = score_strip(view.drops)
    if view.sureness:
        drawn["sureness"] = sureness_map(view.sureness[0])
    if view.agreement is not None:
        drawn["agreement"] = agreement_map(view.agreement)
    if view.costs is not None and view.costs.overall:
        drawn["cost"] = cost_dots(view.costs, _chosen(view))
        if view.costs.by_domain:
            drawn["cost-by-domain"] = cost_map(view.costs)
    rounds = None if collab is None else fit_history(collab.history, collab.settings)
    if rounds is not None:
        drawn["objective"] = objective_curve(rounds)
    # Plotly escapes <, > and / in its JSON; our figures escape what they show.
    return {name: Markup(as_html(one, f"fig-{name}")) for name, one in drawn.items()}


def _criterion_line(name: str) -> str:
    """What a criterion is, in its own words; nothing for one that is not registered."""
    try:
        return criteria.get(name).form["summary"]
    except MoeCollabError:
        return ""
