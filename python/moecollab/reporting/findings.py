"""Sentences that say what was found, computed from the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from moecollab.evaluation.evaluation import Evaluation
from moecollab.reporting.costs import Cost, Costs, gap, pretty
from moecollab.reporting.drops import Drops
from moecollab.reporting.expert_use import ExpertUse
from moecollab.reporting.levels import LevelView
from moecollab.reporting.numbers import Ledger, Number, sentence

BUSY = 0.1
CHANCE = "random"


def use_finding(use: ExpertUse, drops: Drops | None, ledger: Ledger) -> Markup:
    """How unevenly the experts are used, and how much the dropped ones did."""
    busy = ledger.share("use.busiest_tenth", use.busiest(BUSY))
    found = sentence("The busiest 10\u202f% of experts do <b>{}</b> of the routed work", busy)
    if drops is not None and drops.use_lost is not None:
        lost = ledger.share("drops.use_lost", drops.use_lost)
        gone = ledger.count("plan.n_dropped", int(drops.gone.sum()))
        found += sentence("; the {} that the plan drops did <b>{}</b>", gone, lost)
    found += "."
    if len(use.domains) > 1:
        layer = use.layers[int(use.divergence.argmax())]
        number = ledger.count("use.most_divergent_layer", layer)
        found += sentence(" Domains part ways most in layer {}.", number)
    return found


def pattern_finding(level: LevelView, ledger: Ledger) -> Markup:
    """How many groups were found, how many join experts, and what the clearest is about."""
    found = sentence(
        "<b>{}</b> groups were found (of {} allowed), <b>{}</b> of them of several experts",
        ledger.count("patterns.1.live", level.n_live),
        ledger.count("patterns.1.atoms", level.n_atoms),
        ledger.count("patterns.1.joined", level.n_joined),
    )
    leaning = [(card.top, card) for card in level.mapped if card.top is not None]
    if not leaning:
        return found + "; none leans to one domain."
    top, card = max(leaning, key=lambda one: (one[1].joins, one[0].lift))
    return found + sentence(
        '. The clearest, <a href="#{0}">{0}</a>, is <b>{1}</b> as busy in {2} as by chance.',
        card.name,
        ledger.times(f"{level.key(card)}.top_lift", top.lift),
        top.domain,
    )


def cost_findings(
    costs: Costs,
    evaluations: Mapping[str, Evaluation],
    ledger: Ledger,
    chosen: str | None = None,
) -> list[Markup]:
    """What each fraction costs: by the plan's criterion against chance and the best, or the best.

    Parameters
    ----------
    costs : Costs
        All costs.
    evaluations : mapping of str to Evaluation
        What they were computed from.
    ledger : Ledger
        Takes the numbers.
    chosen : str, optional
        Criterion of the plan that the page is about.
    """
    found = []
    for drop in costs.drops:
        ours, chance = costs.of(chosen or "", drop), costs.of(CHANCE, drop)
        best = costs.at(drop)[0]
        if ours is None:
            found.append(_alone(best, ledger))
            continue
        line = _of_chosen(ours, chance, ledger)
        others = [one for one in costs.at(drop) if one.criterion not in (chosen, CHANCE)]
        if best.criterion not in (chosen, CHANCE):
            line += _better(ours, best, ledger)
        elif best.criterion == chosen and others:
            line += Markup(" No other criterion tried costs less.")
        pairs = [chance, *others[:1]]
        gaps = [_gap(ours, other, evaluations, ledger) for other in pairs if other is not None]
        found.append(line + Markup("<small>{}</small>").format(Markup(" ").join(gaps)))
    return found


def _of_chosen(ours: Cost, chance: Cost | None, ledger: Ledger) -> Markup:
    found = sentence(
        "Dropping the {} of experts that {} ranks lowest costs <b>{}</b> nats per token",
        _fraction(ours, ledger),
        pretty(ours.criterion),
        _added(ours, ledger),
    )
    if chance is None:
        return found + "."
    return found + sentence("; dropping random ones costs <b>{}</b>.", _added(chance, ledger))


def _better(ours: Cost, best: Cost, ledger: Ledger) -> Markup:
    name = pretty(ours.criterion)
    return sentence(
        " {} is not the best here: {} costs <b>{}</b>.",
        name[:1].upper() + name[1:],
        pretty(best.criterion),
        _added(best, ledger),
    )


def _alone(best: Cost, ledger: Ledger) -> Markup:
    return sentence(
        "Dropping {} of the experts costs <b>{}</b> nats per token at best ({}).",
        _fraction(best, ledger),
        _added(best, ledger),
        pretty(best.criterion),
    )


def _gap(ours: Cost, other: Cost, evaluations: Mapping[str, Evaluation], ledger: Ledger) -> Markup:
    """The paired difference with its interval, and whether it may be chance."""
    found = gap(evaluations, ours, other)
    key = f"gap.{ours.name}.{other.name}"
    middle = ledger.change(f"{key}.difference", found.difference)
    pair = f"{pretty(ours.criterion)} \N{MINUS SIGN} {pretty(other.criterion)}"
    if found.low is None or found.high is None:
        return sentence("{}: {} (one text, so no interval).", pair, middle)
    low = ledger.change(f"{key}.low", found.low)
    high = ledger.change(f"{key}.high", found.high)
    note = "; may be chance" if found.low <= 0 <= found.high else ""
    return sentence("{}: {} (95\u202f% interval {} to {}{}).", pair, middle, low, high, note)


def _fraction(cost: Cost, ledger: Ledger) -> Number:
    return ledger.share(f"cost.{cost.name}.drop", cost.drop or 0.0)


def _added(cost: Cost, ledger: Ledger) -> Number:
    return ledger.loss(f"cost.{cost.name}.difference", cost.difference)
