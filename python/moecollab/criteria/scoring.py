"""Scoring: look up a criterion, check what it needs, run it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moecollab import criteria
from moecollab.criteria.base import Criterion, Evidence, Needs, check_needs, needs_of
from moecollab.criteria.scores import Scores
from moecollab.errors import SettingsError, ShapeError, StaleInputError
from moecollab.manifest import refuse_existing
from moecollab.record.activations import Activations
from moecollab.record.counts import RoutingCounts, open_recorded

if TYPE_CHECKING:
    from moecollab.patterns.dictionary import Collaboration


def score(
    criterion: str,
    activations: Activations | RoutingCounts | str | PathLike[str],
    *,
    collaboration: Collaboration | str | PathLike[str] | None = None,
    drop: float = 0.25,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores of all experts by one criterion.

    Parameters
    ----------
    criterion : str
        Name of a registered criterion: ``moecollab.criteria.names()``.
    activations : Activations, RoutingCounts or path
        What the routers did, recorded by ``extract`` or imported.
    collaboration : Collaboration or path, optional
        Patterns fitted on these activations, for criteria that need them.
    drop : float
        Fraction of experts that will go, in [0, 1). Only ``caep`` looks at it; pass the one that
        ``plan`` will get.
    seed : int
        Seed of a criterion that draws, ≥ 0.
    out : path, optional
        Parquet file to write.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    MissingInputError
        When the criterion needs something that was not recorded or given.
    StaleInputError
        When the collaboration was fitted on other activations.
    """
    chosen = criteria.get(criterion)
    _check_settings(drop, seed)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    acts = open_recorded(activations)
    check_needs(chosen, _available(acts, given=collaboration is not None))
    patterns = _patterns(chosen, acts, collaboration)
    evidence = Evidence(
        tallies=acts.tallies().total(),
        top_k=acts.top_k,
        collaboration=patterns,
        drop=drop,
        seed=seed,
    )
    scores = Scores(
        criterion=criterion,
        values=_checked(chosen, chosen.function(evidence), evidence.shape),
        counts=evidence.tallies.count.astype(np.int64),
        layers=tuple(acts.layers),
        top_k=acts.top_k,
        activations=acts.digest(),
        settings={"seed": seed} | ({"drop": drop} if chosen.by_drop else {}),
    )
    if out is not None:
        scores.save(out, overwrite=overwrite)
    return scores


def _check_settings(drop: float, seed: int) -> None:
    if not 0 <= drop < 1:
        raise SettingsError("drop", drop, "in [0, 1)")
    if seed < 0:
        raise SettingsError("seed", seed, "at least 0")


def _available(acts: Activations | RoutingCounts, *, given: bool) -> Needs:
    """What these activations, and a collaboration if given, can answer."""
    found = needs_of(acts.groups)
    if acts.has_weights:
        found |= Needs.ROUTING_WEIGHTS
    return found | Needs.COLLABORATION if given else found


def _patterns(
    criterion: Criterion,
    acts: Activations | RoutingCounts,
    given: Collaboration | str | PathLike[str] | None,
) -> Collaboration | None:
    """The collaboration, if the criterion wants one, checked to belong to these activations."""
    if given is None or Needs.COLLABORATION not in criterion.needs:
        return None
    from moecollab.patterns.dictionary import Collaboration, load_collaboration

    patterns = given if isinstance(given, Collaboration) else load_collaboration(given)
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
    return patterns


def _checked(
    criterion: Criterion, values: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    if values.shape != shape or values.dtype != np.float64:
        raise ShapeError(
            f"criterion {criterion.name!r} gave {values.dtype} {values.shape}, expected float64 "
            f"{shape}; repair its function"
        )
    return values
