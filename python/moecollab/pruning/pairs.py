"""Recordings that are resampled, each with the patterns fitted on it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TypeAlias

from moecollab.criteria.base import Criterion, Needs, check_needs
from moecollab.criteria.scoring import answers, fitted_on
from moecollab.errors import DataError, MissingInputError, SettingsError
from moecollab.patterns.collaboration import Collaboration
from moecollab.patterns.drawn import check_rows
from moecollab.pruning.draws import by_cell, summed_groups
from moecollab.record.activations import Activations, load_activations
from moecollab.record.folds import SINGLE

Recorded: TypeAlias = "Activations | str | PathLike[str]"
Patterns: TypeAlias = "Collaboration | str | PathLike[str]"


def open_pairs(
    criterion: Criterion,
    recordings: Recorded | Sequence[Recorded],
    patterns: Patterns | Sequence[Patterns] | None,
) -> tuple[list[Activations], list[Collaboration | None]]:
    """Recordings and, beside each, what was fitted on it; checked to answer the criterion."""
    opened, given = _paired(_opened(recordings), _listed(criterion, patterns))
    fitted = [fitted_on(criterion, acts, one) for acts, one in zip(opened, given, strict=True)]
    for acts, collab in zip(opened, fitted, strict=True):
        found = Needs.NOTHING if collab is None else Needs.COLLABORATION
        check_needs(criterion, answers(acts) | found)
        if collab is not None:
            check_rows(collab, acts)
        _check_folds(criterion, acts)
    return opened, fitted


def _opened(given: Recorded | Sequence[Recorded]) -> list[Activations]:
    listed = [given] if isinstance(given, Activations | str | PathLike) else list(given)
    if not listed:
        raise DataError("there are no recordings; give at least one")
    return [one if isinstance(one, Activations) else load_activations(one) for one in listed]


def _listed(
    criterion: Criterion, given: Patterns | Sequence[Patterns] | None
) -> Sequence[Patterns]:
    """The patterns, if the criterion wants some."""
    if given is None or Needs.COLLABORATION not in criterion.needs:
        return []
    return [given] if isinstance(given, Collaboration | str | PathLike) else list(given)


def _paired(
    recordings: list[Activations], patterns: Sequence[Patterns]
) -> tuple[list[Activations], Sequence[Patterns | None]]:
    """A recording for each fit; several fits may be of one recording."""
    if not patterns:
        return recordings, [None] * len(recordings)
    if len(recordings) == 1:
        return recordings * len(patterns), patterns
    if len(recordings) != len(patterns):
        raise SettingsError(
            "collaboration",
            f"{len(patterns)} fits",
            f"one fit for each of the {len(recordings)} recordings, in the same order",
        )
    return recordings, patterns


def _check_folds(criterion: Criterion, acts: Activations) -> None:
    """Raises unless sums by parts of the documents can be had of all that the criterion reads."""
    if acts.n_samples < 2:
        raise DataError(
            f"{acts.path} has {acts.n_samples} documents, of which no others can be drawn; "
            "record at least 2"
        )
    if set(summed_groups(criterion)) <= set(SINGLE):
        return
    stored = acts.fold_tallies(by_domain=True)
    if stored is None:
        raise MissingInputError(
            f"{criterion.name} reads what is summed while recording only, and {acts.path} has "
            "no folds; extract again with folds=32 (--folds 32)"
        )
    if Needs.DOMAINS in criterion.needs and not by_cell(stored):
        raise MissingInputError(
            f"{criterion.name} reads sums by domain, and the folds of {acts.path} hold none; "
            "extract again with folds=32 (--folds 32)"
        )
