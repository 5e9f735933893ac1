"""Scoring: look up a criterion, check what it needs, run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab import criteria
from moecollab.criteria.base import SUMMED, Criterion, Evidence, Needs, check_needs, needs_of
from moecollab.criteria.probe import Shape, Text, check_same, read_probe
from moecollab.criteria.scores import Scores
from moecollab.embedded import located
from moecollab.errors import SHARE, MissingInputError, SettingsError, ShapeError, StaleInputError
from moecollab.manifest import refuse_existing
from moecollab.record.activations import Activations
from moecollab.record.counts import RoutingCounts, open_recorded
from moecollab.record.tallies import Tallies
from moecollab.settings import names_in

if TYPE_CHECKING:
    from moecollab.models.groups import RouterGroups
    from moecollab.models.loading import ModelLike
    from moecollab.models.weights import ExpertWeights
    from moecollab.patterns.dictionary import Collaboration


def score(  # noqa: PLR0913 (a criterion may need any of these)
    criterion: str,
    activations: Activations | RoutingCounts | str | PathLike[str] | None = None,
    *,
    model: ModelLike | None = None,
    corpus: Text | None = None,
    collaboration: Collaboration | str | PathLike[str] | None = None,
    domains: str | Sequence[str] | None = None,
    drop: float = 0.25,
    tokens: int | None = None,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores of all experts by one criterion.

    A model, text and patterns may be given to criteria that do without, so that all can be scored
    by one call; they must be there all the same.

    Parameters
    ----------
    criterion : str
        Name of a registered criterion: ``moecollab.criteria.names()``.
    activations : Activations, RoutingCounts or path, optional
        What the routers did, recorded by ``extract`` or imported. A criterion that reads parameters
        alone, or nothing, does without if there is a model.
    model : Module, path or hub name, optional
        For criteria that read parameters, layer by layer from files, or that run the model.
    corpus : path, Corpus, iterable of documents, or sequence of int64 arrays, optional
        Text for criteria that run the model, or token ids of windows.
    collaboration : Collaboration or path, optional
        Patterns fitted on these activations, for criteria that need them.
    domains : str or sequence of str, optional
        Domains of the text to score by, such as "law,code"; all if None. For criteria that read
        sums alone; :func:`moecollab.blend` puts scores of several domains together.
    drop : float
        Fraction of experts that will go, in [0, 1). Only criteria whose ranking depends on it, such
        as ``caep``, look at it; pass the one that ``plan`` will get.
    tokens : int, optional
        Most tokens of the `corpus` to run, ≥ 1; all if None.
    seed : int
        Seed of a criterion that draws, and of the choice of text under a limit, ≥ 0.
    out : path, optional
        Parquet file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    DataError
        When the model, text or patterns that are given are not there or damaged.
    MissingInputError
        When the criterion needs something that was not recorded or given.
    StaleInputError
        When the collaboration was fitted on other activations.
    ShapeError
        When the model is not the one that was recorded.
    """
    chosen = criteria.get(criterion)
    _check_settings(drop, seed, tokens)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    acts = None if activations is None else open_recorded(activations)
    model = located(model)
    _check_limited(tokens, corpus)
    _check_readable(model, corpus)
    given = _given(model, corpus, patterns=collaboration is not None)
    check_needs(chosen, given | answers(acts))
    weights = _weights(model) if acts is None or Needs.WEIGHTS in chosen.needs else None
    shape = _shape(acts, weights)
    chosen_domains = _domains(chosen, acts, domains)
    total, by_domain = _sums(acts, shape, chosen_domains)
    evidence = Evidence(
        tallies=total,
        by_domain=by_domain,
        top_k=shape.top_k,
        activations=acts if isinstance(acts, Activations) else None,
        collaboration=fitted_on(chosen, acts, collaboration),
        weights=weights,
        drop=drop,
        seed=seed,
        experts_per_layer=shape.experts_per_layer,
    )
    if Needs.MODEL in chosen.needs and model is not None and corpus is not None:
        evidence = _with_runs(evidence, shape, model, corpus, tokens)
    scores = Scores(
        criterion=criterion,
        values=_checked(chosen, _values(chosen, evidence), evidence.shape),
        counts=evidence.tallies.count.astype(np.int64),
        layers=shape.layers,
        top_k=shape.top_k,
        activations=None if acts is None else acts.digest(),
        settings=_settings(chosen, evidence, model)
        | ({} if chosen_domains is None else {"domains": chosen_domains}),
        groups=_groups(acts, weights),
        experts_per_layer=shape.experts_per_layer,
    )
    if out is not None:
        scores.save(out, overwrite=overwrite)
    return scores


def _check_settings(drop: float, seed: int, tokens: int | None) -> None:
    if not 0 <= drop < 1:
        raise SettingsError("drop", drop, SHARE)
    if seed < 0:
        raise SettingsError("seed", seed, "at least 0")
    if tokens is not None and tokens < 1:
        raise SettingsError("tokens", tokens, "1 or more, or None for all")


def _check_limited(tokens: int | None, corpus: Text | None) -> None:
    if tokens is not None and corpus is None:
        raise SettingsError("tokens", tokens, "left out without corpus (--corpus), which it limits")


def _check_readable(model: ModelLike | None, corpus: Text | None) -> None:
    """Raises unless what is given as a path is there, whether the criterion reads it or not."""
    if isinstance(model, str | PathLike):
        from moecollab.models.loading import open_config
        from moecollab.models.masked import read_masked

        masked = read_masked(model)
        open_config(str(model) if masked is None else masked[0], moe=False)
    if corpus is not None:
        from moecollab.record.corpus import check_there

        check_there(corpus)


def _given(model: ModelLike | None, corpus: Text | None, *, patterns: bool) -> Needs:
    """What a model, text and patterns can answer."""
    found = Needs.COLLABORATION if patterns else Needs.NOTHING
    if model is None:
        return found
    return found | (Needs.WEIGHTS if corpus is None else Needs.WEIGHTS | Needs.MODEL)


def answers(acts: Activations | RoutingCounts | None) -> Needs:
    """What criteria need that these activations can answer."""
    if acts is None:
        return Needs.NOTHING
    found = needs_of(acts.groups) | Needs.DOMAINS
    if isinstance(acts, Activations):
        found |= Needs.TOKENS
    return found | Needs.ROUTING_WEIGHTS if acts.has_weights else found


def _weights(model: ModelLike | None) -> ExpertWeights | None:
    from moecollab.models.weights import ExpertWeights

    return None if model is None else ExpertWeights(model)


def _shape(acts: Activations | RoutingCounts | None, weights: ExpertWeights | None) -> Shape:
    """Layers, experts and top-k, of the recording or else of the model."""
    recorded = None if acts is None else Shape.recorded(acts)
    model = None if weights is None else Shape.of_model(weights.layers)
    if recorded is not None and model is not None:
        check_same(recorded, model)
    found = recorded or model
    if found is None:
        raise MissingInputError(
            "there is nothing that says how many experts there are; pass activations, or the model "
            "for criteria that read no text (--model)"
        )
    return found


def _groups(
    acts: Activations | RoutingCounts | None, weights: ExpertWeights | None
) -> RouterGroups | None:
    """Groups of the routers, from the recording or else from the model."""
    if weights is not None:
        from moecollab.models.groups import router_groups

        return router_groups(weights.layers[0])
    return None if acts is None else acts.router_groups


def _domains(
    criterion: Criterion,
    acts: Activations | RoutingCounts | None,
    asked: str | Sequence[str] | None,
) -> list[str] | None:
    """The domains that were asked for, if the criterion can be restricted to some."""
    if asked is None:
        return None
    wanted = list(dict.fromkeys(names_in("domains", asked)))
    if acts is None or not wanted:
        raise SettingsError("domains", asked, "some of those that were recorded")
    if criterion.needs & ~SUMMED:
        raise SettingsError(
            "domains", asked, f"left out: {criterion.name} reads more than sums by domain"
        )
    return wanted


def _sums(
    acts: Activations | RoutingCounts | None, shape: Shape, domains: Sequence[str] | None
) -> tuple[Tallies, Tallies | None]:
    """The sums over all domains, and by domain; zero counts where nothing was recorded."""
    if acts is None:
        size = len(shape.layers), shape.n_experts
        return Tallies.zeros(("",), *size, groups=("routing",)).total(), None
    found = acts.tallies() if domains is None else acts.tallies().select(domains)
    return found.total(), found


def _with_runs(
    evidence: Evidence, shape: Shape, model: ModelLike, corpus: Text, tokens: int | None
) -> Evidence:
    """The evidence with a loaded model and windows to run it on."""
    from moecollab.models.loading import load_model
    from moecollab.models.routing import find_moe_layers

    loaded, tokenizer = load_model(model)
    check_same(shape, Shape.of_model(find_moe_layers(loaded)))
    probe = read_probe(corpus, loaded, tokenizer, tokens, evidence.seed)
    return replace(evidence, model=loaded, probe=probe)


def _values(criterion: Criterion, evidence: Evidence) -> NDArray[np.float64]:
    """What the criterion gives, with the model in evaluation mode meanwhile."""
    model = evidence.model
    if model is None or not model.training:
        return criterion.function(evidence)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return criterion.function(evidence)
    finally:
        for module, training in modes:
            module.training = training


def _settings(
    criterion: Criterion, evidence: Evidence, model: ModelLike | None
) -> dict[str, object]:
    """What the scores depend on beside the recording."""
    found: dict[str, object] = {"seed": evidence.seed}
    if criterion.by_drop:
        found["drop"] = evidence.drop
    if criterion.needs & (Needs.WEIGHTS | Needs.MODEL):
        found["model"] = str(getattr(model, "name_or_path", model))
    if evidence.probe:
        found["tokens"] = sum(len(window) for window in evidence.probe)
    return found


def fitted_on(
    criterion: Criterion,
    acts: Activations | RoutingCounts | None,
    given: Collaboration | str | PathLike[str] | None,
) -> Collaboration | None:
    """The collaboration, if the criterion wants one, checked to belong to these activations."""
    if given is None:
        return None
    from moecollab.patterns.dictionary import Collaboration, load_collaboration

    patterns = given if isinstance(given, Collaboration) else load_collaboration(given)
    if acts is None:
        return None
    digest = acts.digest()
    if patterns.activations not in (None, digest):
        raise StaleInputError(
            f"the collaboration was fitted on activations {patterns.activations}, but these are "
            f"{digest}; fit it again on these"
        )
    sites = patterns.levels[0].atoms.shape[1]
    if sites != acts.n_sites:
        raise ShapeError(
            f"the collaboration covers {sites} experts, but the activations have {acts.n_sites}; "
            "fit it on these activations"
        )
    return patterns if Needs.COLLABORATION in criterion.needs else None


def _checked(
    criterion: Criterion, values: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    if values.shape != shape or values.dtype != np.float64:
        raise ShapeError(
            f"criterion {criterion.name!r} gave {values.dtype} {values.shape}, expected float64 "
            f"{shape}; repair its function"
        )
    return values
