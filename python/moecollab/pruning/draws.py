"""What a criterion is shown of documents that are drawn with replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs, groups_of
from moecollab.patterns.collaboration import Collaboration
from moecollab.patterns.drawn import used_by
from moecollab.record.activations import Activations
from moecollab.record.drawn import Documents
from moecollab.record.folding import cell_name, cell_parts, folds_of
from moecollab.record.folds import tallies_by
from moecollab.record.sums import SUMS, names_of
from moecollab.record.tallies import Tallies

READ = Needs.TOKENS | Needs.PREFERENCES | Needs.COLLABORATION
"""Needs of a recording's rows, beside sums; its criteria score each recording by itself."""
FOLDS = 64
"""Folds of a recording that was made without, if there are as many documents."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A recording, its patterns if any, and its sums, in folds of documents that are drawn.

    Parameters
    ----------
    documents : Documents
        What rows are drawn from.
    collaboration : Collaboration, optional
        Patterns fitted on it.
    fold : int64 array of shape (n_samples,)
        Fold of each document.
    sums : Tallies
        By fold, or by fold and domain (:func:`moecollab.record.folding.cell_name`).
    """

    documents: Documents
    collaboration: Collaboration | None
    fold: NDArray[np.int64]
    sums: Tallies

    @cached_property
    def n_folds(self) -> int:
        """Number of folds."""
        return int(self.fold.max()) + 1

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """How often each fold is drawn, of as many draws as there are folds."""
        return np.bincount(rng.integers(0, self.n_folds, self.n_folds), minlength=self.n_folds)

    def total(self, times: NDArray[np.int64]) -> Tallies:
        """Sums over the folds, each as often as told."""
        return weighted(self.sums, times[self._fold_of_cell])

    def by_domain(self, times: NDArray[np.int64]) -> Tallies:
        """The same by domain, of the domains that were drawn."""
        of_cell, names = times[self._fold_of_cell], np.array(self._domain_of_cell)
        drawn = sorted(set(names[of_cell > 0].tolist()))
        parts = [weighted(self.sums, np.where(names == name, of_cell, 0)).arrays for name in drawn]
        stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return Tallies(tuple(drawn), stacked)

    def evidence(self, plain: Evidence, times: NDArray[np.int64]) -> Evidence:
        """The evidence with what single tokens and patterns of the drawn documents say."""
        drawn = self.documents.drawn(times[self.fold])
        patterns = self.collaboration
        return replace(
            plain,
            activations=drawn,
            collaboration=None if patterns is None else used_by(patterns, drawn),
        )

    @cached_property
    def _fold_of_cell(self) -> NDArray[np.int64]:
        return np.array([cell_parts(name)[0] for name in self.sums.domains], np.int64)

    @cached_property
    def _domain_of_cell(self) -> list[str]:
        return [cell_parts(name)[1] for name in self.sums.domains]


def weighted(part: Tallies, times: NDArray[np.int64]) -> Tallies:
    """The total of some sums, each as often as told."""
    found = {}
    for name, value in part.arrays.items():
        if SUMS[name].join == "peak":  # which token was highest is no sum
            continue
        if SUMS[name].join == "max":
            found[name] = value[times > 0].max(axis=0, initial=0)
        else:
            found[name] = np.tensordot(times.astype(value.dtype), value, axes=1)
    return Tallies((), found)


def drawn_evidence(
    criterion: Criterion, sources: Sequence[Source], plain: Evidence, rng: np.random.Generator
) -> list[Evidence]:
    """What a criterion is shown in one draw: of as many sources as there are, with replacement.

    Sums are added up over the sources drawn. A criterion that reads more is shown one source after
    the other, and its scores are to be averaged.
    """
    drawn = [sources[number] for number in rng.integers(0, len(sources), len(sources))]
    times = [source.draw(rng) for source in drawn]
    totals = [source.total(often) for source, often in zip(drawn, times, strict=True)]
    shown = [replace(plain, tallies=total) for total in totals]
    if Needs.DOMAINS in criterion.needs:
        parts = [source.by_domain(often) for source, often in zip(drawn, times, strict=True)]
        shown = [replace(one, by_domain=part) for one, part in zip(shown, parts, strict=True)]
    if criterion.needs & READ:
        sums = zip(shown, drawn, times, strict=True)
        return [source.evidence(one, often) for one, source, often in sums]
    return [reduce(_together, shown)]


def _together(first: Evidence, second: Evidence) -> Evidence:
    """The sums of two recordings as one."""
    domains = first.by_domain
    if domains is not None and second.by_domain is not None:
        domains = domains.merge(second.by_domain)
    return replace(first, tallies=first.tallies.merge(second.tallies), by_domain=domains)


def sources_of(
    criterion: Criterion,
    recordings: Sequence[Activations],
    patterns: Sequence[Collaboration | None],
    folds: int | None,
    seed: int,
) -> list[Source]:
    """The recordings in so many folds, or in their own, with sums of what the criterion reads.

    The arguments are those of :func:`moecollab.uncertainty`, read and checked.
    """
    each = {id(acts): acts for acts in recordings}  # one may be there with several patterns
    cut = {key: _cut(criterion, acts, folds, seed) for key, acts in each.items()}
    held = {key: Documents(acts) for key, acts in each.items()}
    wanted = names_of(summed_groups(criterion))
    shared = [name for name in wanted if all(name in sums for _, sums in cut.values())]
    found = []
    for acts, collab in zip(recordings, patterns, strict=True):
        fold, sums = cut[id(acts)]
        sums = Tallies(sums.domains, {name: sums[name] for name in shared})
        made = Source(documents=held[id(acts)], collaboration=collab, fold=fold, sums=sums)
        found.append(made)
    return found


def _cut(
    criterion: Criterion, acts: Activations, folds: int | None, seed: int
) -> tuple[NDArray[np.int64], Tallies]:
    """Fold of each document, and sums by fold, by domain as well where they are read so."""
    by_domain = Needs.DOMAINS in criterion.needs
    stored = acts.fold_tallies(by_domain=by_domain)
    usable = stored is not None and (not by_domain or by_cell(stored))
    if stored is not None and usable and folds in (None, count_folds(stored)):
        # As `extract` made them: by the seed of the recording.
        made_by = acts.manifest["settings"]["seed"]
        return folds_of(acts.n_samples, count_folds(stored), seed=made_by), stored
    fold = folds_of(acts.n_samples, min(folds or FOLDS, acts.n_samples), seed=seed)
    names = acts.samples()["domain"].to_list() if by_domain else [""] * acts.n_samples
    cells = [cell_name(one, name) for one, name in zip(fold.tolist(), names, strict=True)]
    order = sorted(set(cells))
    place = {cell: number for number, cell in enumerate(order)}
    part = np.array([place[cell] for cell in cells], np.int64)
    sums = tallies_by(acts, part, len(order), summed_groups(criterion))
    return fold, Tallies(tuple(order), sums.arrays)


def count_folds(sums: Tallies) -> int:
    """Number of folds of sums by fold."""
    return len({cell_parts(name)[0] for name in sums.domains})


def by_cell(sums: Tallies) -> bool:
    """Whether sums by fold are by domain as well."""
    return bool(cell_parts(sums.domains[0])[1])


def summed_groups(criterion: Criterion) -> tuple[str, ...]:
    """Groups of sums that a criterion reads."""
    named = dict.fromkeys(("routing", *groups_of(criterion.needs)))
    return tuple(group for group in named if names_of([group]))
