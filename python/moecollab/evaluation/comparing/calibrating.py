"""One calibration: a recording, its patterns, and every criterion's plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria import collects
from moecollab.criteria.base import Needs
from moecollab.criteria.probe import read_probe
from moecollab.criteria.scores import Scores, load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import StaleInputError
from moecollab.evaluation.comparing.grid import Entry, Grid
from moecollab.patterns.dictionary import Collaboration, load_collaboration
from moecollab.pruning.budgets import Per
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import Plan
from moecollab.record.activations import Activations, load_activations
from moecollab.record.extraction import extract

if TYPE_CHECKING:
    from moecollab.record.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one seed's plans are made from; what has been made in the folder is read again.

    Parameters
    ----------
    folder : Path
        Where recording, fits and scores go.
    seed : int
        Seed of fits and of criteria that draw.
    grid : Grid
        What is tried.
    corpus : Corpus
        This seed's documents.
    model, tokenizer : causal language model and its tokenizer
        Loaded.
    probe_tokens : int
        Most tokens on which a criterion runs the model again.
    context, batch_size : int
        Tokens per window, and windows per forward pass.
    """

    folder: Path
    seed: int
    grid: Grid
    corpus: Corpus
    model: Any
    tokenizer: Any
    probe_tokens: int
    context: int
    batch_size: int

    def record(self) -> Activations:
        """One pass that serves every criterion."""
        path = self.folder / "activations"
        groups = collects(*(entry.criterion.name for entry in self.grid.entries()))
        if path.exists():
            return _checked(load_activations(path), groups)
        return extract(
            self.model,
            self.corpus,
            out=path,
            tokenizer=self.tokenizer,
            collect=[group for group in groups if group not in ("routing", "norms")],
            context=self.context,
            batch_size=self.batch_size,
        )

    def fit(self, name: str, acts: Activations) -> Collaboration:
        """The patterns of one fit."""
        path = self.folder / f"fit-{name}"
        if path.exists():
            return load_collaboration(path)
        found = replace(self.grid.fits[name], seed=self.seed).fit(acts)
        found.save(path)
        return found

    def plans(self) -> Iterator[tuple[str, Per, float, Plan]]:
        """Criterion, budget, share and plan of every cell."""
        acts = self.record()
        fits = {name: self.fit(name, acts) for name in self.grid.fits_needed()}
        for entry in self.grid.entries():
            for drop in self.grid.drops:
                scores = self._scores(entry, drop, acts, fits)
                for per in self.grid.per:
                    yield entry.name, per, drop, plan(scores, drop=drop, per=per)

    def _scores(
        self, entry: Entry, drop: float, acts: Activations, fits: dict[str, Collaboration]
    ) -> Scores:
        """Scores of one criterion; from their file if they ran the model, which takes long.

        Others are made anew, so that a criterion whose formula has changed is not mixed with what
        it was.
        """
        ending = f"-{drop:g}" if entry.criterion.by_drop else ""
        read = "" if entry.fit is None else f"@{entry.fit}"
        path = self.folder / "scores" / f"{entry.criterion.name}{read}{ending}.parquet"
        needs = entry.criterion.needs
        if path.exists() and Needs.MODEL in needs:
            return load_scores(path)
        return score(
            entry.criterion.name,
            acts,
            model=self.model if needs & (Needs.WEIGHTS | Needs.MODEL) else None,
            corpus=self._probe() if Needs.MODEL in needs else None,
            collaboration=None if entry.fit is None else fits[entry.fit],
            drop=drop,
            seed=self.seed,
            out=path,
            overwrite=True,
        )

    def _probe(self) -> tuple[NDArray[np.int64], ...]:
        """Windows to run the model on, for criteria that do."""
        return read_probe(self.corpus, self.model, self.tokenizer, self.probe_tokens, self.seed)


def _checked(acts: Activations, groups: Sequence[str]) -> Activations:
    """The recording, if it has all sums that the criteria need."""
    missing = [group for group in groups if group not in acts.groups]
    if missing:
        raise StaleInputError(
            f"{acts.path} was recorded without {', '.join(missing)}, which a criterion needs; "
            "leave that criterion out, or pass overwrite (--overwrite) to start anew"
        )
    return acts
