"""What a criterion is: a named score function that declares what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import MissingInputError

if TYPE_CHECKING:
    from moecollab.models.weights import ExpertWeights
    from moecollab.patterns.dictionary import Collaboration
    from moecollab.record.activations import Activations
    from moecollab.record.tallies import Tallies

FORM = ("formula", "needs", "direction", "cost", "source", "not defined when")
"""Lines that the docstring of every score function has, in this order."""


class Needs(Flag):
    """Kinds of input a criterion may ask for."""

    NOTHING = 0
    ROUTING = auto()
    """Counts of routed tokens; every recording has them."""
    ROUTING_WEIGHTS = auto()
    """Sums of routing weights; every extraction records them, some imports do not."""
    OUTPUT_NORMS = auto()
    """Sums of the norms of expert outputs; recorded on request."""
    SHIFT = auto()
    """How far the routed experts turn the residual stream; recorded on request."""
    CHANNELS = auto()
    """Expert outputs summed channel by channel; recorded on request."""
    PROBABILITY = auto()
    """Router probability before top-k; recorded on request."""
    PAIRS = auto()
    """How often two experts are chosen together; recorded on request."""
    VOCABULARY = auto()
    """Which token ids each expert saw; recorded on request."""
    PREFERENCES = auto()
    """The experts that every token's router would choose next; recorded on request."""
    TOKENS = auto()
    """What each single token did; every extraction records it, counts lack it."""
    COLLABORATION = auto()
    """Patterns fitted on these activations."""
    WEIGHTS = auto()
    """Parameters of the experts and routers; no text."""
    MODEL = auto()
    """A model that runs, and text to run it on."""
    DOMAINS = auto()
    """Sums by domain beside those of all text; every recording has them."""


_GROUP = {
    Needs.ROUTING: "routing",
    Needs.ROUTING_WEIGHTS: "routing",
    Needs.OUTPUT_NORMS: "norms",
    Needs.SHIFT: "shift",
    Needs.CHANNELS: "channels",
    Needs.PROBABILITY: "probability",
    Needs.PAIRS: "pairs",
    Needs.VOCABULARY: "vocabulary",
    Needs.PREFERENCES: "preferences",
}


_OUTPUTS = Needs.OUTPUT_NORMS | Needs.SHIFT | Needs.CHANNELS
_ROUTING = Needs.ROUTING | Needs.PROBABILITY | Needs.PAIRS | Needs.VOCABULARY | Needs.PREFERENCES
KINDS: dict[str, Needs] = {
    "model runs": Needs.MODEL,
    "patterns": Needs.COLLABORATION,
    "outputs": _OUTPUTS,
    "routing": _ROUTING | Needs.TOKENS,
    "no data": Needs.NOTHING,
}
"""Kinds of criteria, and the needs by which the first that fits is told."""


SUMMED = (
    Needs.ROUTING_WEIGHTS | _OUTPUTS | _ROUTING | Needs.DOMAINS | Needs.WEIGHTS
) & ~Needs.PREFERENCES
"""Needs that sums of any tokens answer, or parameters; criteria of others read the recording."""


def groups_of(needs: Needs) -> tuple[str, ...]:
    """Groups of sums that answer some needs; see :data:`moecollab.record.sums.GROUPS`."""
    return tuple(dict.fromkeys(group for need, group in _GROUP.items() if need in needs))


def needs_of(groups: Iterable[str]) -> Needs:
    """What recorded groups of sums can answer, but for routing weights."""
    found = Needs.NOTHING
    for need, group in _GROUP.items():
        if group in groups and need is not Needs.ROUTING_WEIGHTS:
            found |= need
    return found


def words_of(needs: Needs) -> str:
    """Needs in words.

    Examples
    --------
    >>> words_of(Needs.ROUTING | Needs.OUTPUT_NORMS), words_of(Needs.NOTHING)
    ('routing, output norms', 'nothing')
    """
    return ", ".join(str(need.name).lower().replace("_", " ") for need in needs) or "nothing"


_PROVIDED_BY = {
    Needs.ROUTING: "extract activations from the model first",
    Needs.ROUTING_WEIGHTS: "the files hold expert ids alone; use extract, or files with weights",
    Needs.OUTPUT_NORMS: "extract again with norms=True (--norms)",
    **{
        need: f"extract again with collect={group!r} (--collect {group})"
        for need, group in _GROUP.items()
        if group not in ("routing", "norms")
    },
    Needs.TOKENS: "the source holds sums alone; use extract, or import files with single tokens",
    Needs.COLLABORATION: "fit one on these activations and pass collaboration= (--collaboration)",
    Needs.WEIGHTS: "pass the model: model= (--model)",
    Needs.MODEL: "pass the model and text: model=, corpus= (--model, --corpus)",
    Needs.DOMAINS: "pass activations that were recorded or imported",
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything a score function may look at; what a criterion does not need may be absent.

    Parameters
    ----------
    tallies : Tallies
        Sums over all domains, each array of shape (n_layers, n_experts) and, for some, one axis
        more; zero counts alone where nothing was recorded.
    top_k : int
        Experts that the router selects per token.
    by_domain : Tallies, optional
        The same by domain, which leads the axes: (n_domains, n_layers, n_experts, …). Ask for it by
        `Needs.DOMAINS`; resampled evidence holds it for those alone that do.
    activations : Activations, optional
        The recording itself, for criteria that read single tokens or samples.
    collaboration : Collaboration, optional
        Patterns fitted on the same activations.
    weights : ExpertWeights, optional
        Reads parameters layer by layer, from files or from a loaded model.
    model : PreTrainedModel, optional
        A model that runs, with all its experts, in evaluation mode; leave it as it was.
    probe : tuple of int64 arrays of shape (n_tokens,)
        Token ids to run the model on: windows that are each read from an empty context, padded by
        no one; all of one document are in order.
    drop : float
        Fraction of experts that will go, in [0, 1); used by methods whose ranking depends on it.
    seed : int
        Seed of a criterion that draws.
    experts_per_layer : tuple of int, optional
        Experts of every layer, where layers differ; arrays then hold sites that are no experts,
        past a layer's own, and what they score is not looked at.
    """

    tallies: Tallies
    top_k: int
    by_domain: Tallies | None = None
    activations: Activations | None = None
    collaboration: Collaboration | None = None
    weights: ExpertWeights | None = None
    model: Any = None
    probe: tuple[NDArray[np.int64], ...] = ()
    drop: float = 0.25
    seed: int = 0
    experts_per_layer: tuple[int, ...] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of every layer."""
        return self.experts_per_layer or (self.shape[1],) * self.shape[0]

    def stacked(self, rows: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Scores of every layer's own experts as (n_layers, n_experts), 0 where there is none."""
        found = np.zeros(self.shape)
        for row, own in enumerate(rows):
            found[row, : len(own)] = own
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_experts)."""
        n_layers, n_experts = self.tallies.count.shape[-2:]
        return int(n_layers), int(n_experts)


class ScoreFunction(Protocol):
    """Maps evidence to a float64 array of shape (n_layers, n_experts), higher = keep."""

    __doc__: str | None

    def __call__(self, evidence: Evidence, /) -> NDArray[np.float64]:
        """Scores of all experts."""


@dataclass(frozen=True)
class Criterion:
    """A score function with its name and needs.

    Parameters
    ----------
    name : str
        Lower-case name by which it is asked for.
    needs : Needs
        Inputs without which it cannot run.
    function : ScoreFunction
        A module-level function whose docstring has the lines of `FORM`.
    by_drop : bool
        Whether its scores hold for one dropped fraction only.
    """

    name: str
    needs: Needs
    function: ScoreFunction
    by_drop: bool = False

    @property
    def kind(self) -> str:
        """What it mostly reads: one of :data:`KINDS`."""
        return next(kind for kind, needs in KINDS.items() if self.needs & needs or not needs)

    @property
    def summary(self) -> str:
        """Name, needs and source in one line."""
        source = self.form.get("source", "no source given")
        return f"{self.name} · needs {words_of(self.needs)} · {source}"

    @property
    def form(self) -> dict[str, str]:
        """Lines of the docstring form, and the docstring's first line under ``summary``."""
        lines = (inspect.getdoc(self.function) or "").splitlines()
        found = {"summary": lines[0].strip() if lines else ""}
        current = ""
        for line in lines[1:]:
            label, colon, text = line.partition(":")
            if colon and label.lower() in FORM:
                current = label.lower()
                found[current] = text.strip()
            elif current and line.startswith(" "):
                found[current] = f"{found[current]} {line.strip()}"
            else:
                current = ""
        return found


def check_needs(criterion: Criterion, available: Needs) -> None:
    """Raises MissingInputError unless all that the criterion needs is available."""
    missing = criterion.needs & ~available
    if missing:
        names = words_of(missing)
        advice = "; ".join(_PROVIDED_BY[need] for need in missing)
        raise MissingInputError(
            f"criterion {criterion.name!r} needs {names}, which is not there; {advice}"
        )
