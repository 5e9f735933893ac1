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
from moecollab.patterns.storage import load_collaboration
from moecollab.pruning.draws import by_cell, count_folds, summed_groups
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
    return opened, fitted


def _opened(given: Recorded | Sequence[Recorded]) -> list[Activations]:
    listed = [given] if isinstance(given, Activations | str | PathLike) else list(given)
    if not listed:
        raise DataError("there are no recordings; give at least one")
    return [one if isinstance(one, Activations) else load_activations(one) for one in listed]


def _listed(
    criterion: Criterion, given: Patterns | Sequence[Patterns] | None
) -> Sequence[Patterns]:
    """The patterns, if the criterion wants some; those that it does not must be there as well."""
    if given is None:
        return []
    listed = [given] if isinstance(given, Collaboration | str | PathLike) else given
    found = [one if isinstance(one, Collaboration) else load_collaboration(one) for one in listed]
    return found if Needs.COLLABORATION in criterion.needs else []


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


def check_folds(criterion: Criterion, acts: Activations, asked: int | None) -> None:
    """Raises unless what the criterion reads can be summed over as many folds as are asked for.

    Raises
    ------
    DataError
        When the recording has one document.
    MissingInputError
        When it lacks folds of what is summed while recording only.
    SettingsError
        When it has others, or fewer documents than folds are asked for.
    """
    if acts.n_samples < 2:
        raise DataError(
            f"{acts.path} has {acts.n_samples} documents, of which no others can be drawn; "
            "record at least 2"
        )
    if asked is not None and asked > acts.n_samples:
        allowed = f"at most {acts.n_samples}, the documents of {acts.path}, or left out"
        raise SettingsError("folds", asked, allowed)
    if set(summed_groups(criterion)) <= set(SINGLE):
        return
    _check_stored(criterion, acts, asked)


def _check_stored(criterion: Criterion, acts: Activations, asked: int | None) -> None:
    """Raises unless the folds that a recording was made with are those asked for."""
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
    n_folds = count_folds(stored)
    if asked not in (None, n_folds):
        raise SettingsError(
            "folds",
            asked,
            f"{n_folds}, with which {acts.path} was made, or left out, as {criterion.name} reads "
            "what is summed while recording only",
        )
