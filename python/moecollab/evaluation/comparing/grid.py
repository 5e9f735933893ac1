"""What a comparison tries: criteria, shares to drop, budgets and seeds of calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from moecollab import criteria
from moecollab.criteria.base import Criterion, Needs
from moecollab.errors import SHARE, DataError, MissingInputError, SettingsError
from moecollab.patterns.dictionary import HSDL
from moecollab.pruning.budgets import Per
from moecollab.record.corpus import Corpus
from moecollab.settings import check_whole, is_real, names_in

DEFAULT = ("coverage", "reap", "reap_sum", "easy_ep", "ean_mean", "gate_sum", "caep", "random")
"""Criteria that are compared if none are named."""
PLAIN = "patterns"
"""Name of the fit that a criterion of patterns reads if it names none."""


@dataclass(frozen=True)
class Entry:
    """A criterion, and the fit whose patterns it reads if it reads any."""

    name: str
    criterion: Criterion
    fit: str | None

    @classmethod
    def read(cls, name: str, fits: Mapping[str, HSDL]) -> Entry:
        """An entry from ``criterion`` or ``criterion@fit``.

        Raises
        ------
        SettingsError
            When there is no such criterion or fit, or the criterion reads no patterns.
        """
        asked, at, fit = name.partition("@")
        found = criteria.get(asked)
        if Needs.COLLABORATION not in found.needs:
            if at:
                raise SettingsError("criteria", name, f"{asked} alone, for it reads no patterns")
            return cls(name, found, None)
        chosen = fit or next(iter(fits), PLAIN)
        if chosen not in fits:
            raise SettingsError("criteria", name, f"with one of the fits {', '.join(fits)}")
        return cls(name, found, chosen)

    @property
    def draws(self) -> bool:
        """Whether it may depend on the seed by more than the calibration text."""
        needs = self.criterion.needs
        return self.fit is not None or Needs.MODEL in needs or needs is Needs.NOTHING


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that is tried: one cell per seed, criterion, budget and share.

    Parameters
    ----------
    criteria : tuple of str
        Names of criteria; ``name@fit`` reads the patterns of one of several fits. Given as any
        sequence, or as one text with commas.
    drops : tuple of float
        Shares of the experts that go, in (0, 1). Given as any sequence, or as one number.
    per : tuple of {"layer", "model"}
        What the share holds for. Given as `criteria` are.
    seeds : int
        Calibrations: each draws its own documents, and starts its fits and draws by its seed.
    share : float
        Share of the calibration documents that each seed draws, in (0, 1].
    fits : mapping of name to HSDL
        How patterns are fitted; the first is what a criterion reads that names none.
    """

    criteria: tuple[str, ...] = DEFAULT
    drops: tuple[float, ...] = (0.25, 0.5)
    per: tuple[Per, ...] = ("layer",)
    seeds: int = 3
    share: float = 0.5
    fits: Mapping[str, HSDL] = field(default_factory=lambda: {PLAIN: HSDL()})

    def __post_init__(self) -> None:
        """Checks every value, and makes tuples of what is given otherwise."""
        for name in ("criteria", "per"):
            object.__setattr__(self, name, tuple(names_in(name, getattr(self, name))))
        object.__setattr__(self, "drops", _shares(self.drops))
        if not self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise SettingsError("criteria", ", ".join(self.criteria), "one or more different names")
        if not self.per or not set(self.per) <= {"layer", "model"}:
            raise SettingsError("per", self.per, "layer, model or both")
        check_whole("seeds", self.seeds, 1)
        if not is_real(self.share) or not 0 < self.share <= 1:
            raise SettingsError("share", self.share, f"{SHARE}, or 1 for all documents")
        _check_fits(self.fits)
        for name in self.criteria:
            Entry.read(name, self.fits)

    def entries(self) -> list[Entry]:
        """The criteria, in the order given."""
        return [Entry.read(name, self.fits) for name in self.criteria]

    def fits_needed(self) -> list[str]:
        """Names of the fits that some criterion reads."""
        found = [entry.fit for entry in self.entries() if entry.fit is not None]
        return list(dict.fromkeys(found))

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.seeds * len(self.criteria) * len(self.drops) * len(self.per)

    def as_json(self) -> dict[str, Any]:
        """The grid as plain data."""
        fits = {name: self.fits[name].get_params() for name in self.fits_needed()}
        for params in fits.values():
            params.pop("threads", None)  # the result is the same for any number
        return {
            "criteria": list(self.criteria),
            "drops": list(self.drops),
            "per": list(self.per),
            "seeds": self.seeds,
            "share": self.share,
            "fits": {name: {key: _plain(v) for key, v in fits[name].items()} for name in fits},
        }


def _shares(given: object) -> tuple[float, ...]:
    """Shares to drop, of a sequence or one number."""
    listed = [given] if is_real(given) or isinstance(given, str) else given
    if not isinstance(listed, Iterable):
        raise SettingsError("drops", given, f"{SHARE}, or several")
    found = []
    for one in listed:
        if not isinstance(one, Real) or not 0 < float(one) < 1:
            raise SettingsError("drops", one, SHARE)
        found.append(float(one))
    if not found:
        raise MissingInputError("no share to drop is given; give one or more, such as 0.25,0.5")
    return tuple(found)


def _check_fits(fits: object) -> None:
    each = fits.values() if isinstance(fits, Mapping) else [fits]
    if not isinstance(fits, Mapping) or not all(isinstance(one, HSDL) for one in each):
        raise SettingsError("fits", fits, "an HSDL, or several by name")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def drawn(n_documents: int, share: float) -> int:
    """How many documents of a domain a seed draws."""
    return max(1, round(share * n_documents))


def calibration(corpus: Corpus, share: float, seed: int) -> Corpus:
    """The documents of one seed: a share of each domain, at least one, in the corpus's order."""
    rng = np.random.default_rng([seed, 0x0CA1])
    chosen: list[int] = []
    for domain in corpus.domains:
        own = [i for i, document in enumerate(corpus.documents) if document.domain == domain]
        chosen += rng.permutation(own)[: drawn(len(own), share)].tolist()
    return Corpus(tuple(corpus.documents[i] for i in sorted(chosen)))


def check_apart(corpus: Corpus, held_out: Corpus) -> None:
    """Raises DataError when a document would both calibrate and judge."""
    seen = {document.text: document.id for document in corpus.documents}
    for document in held_out.documents:
        if document.text in seen:
            raise DataError(
                f"document {document.id!r} of the held-out text is {seen[document.text]!r} of the "
                "calibration text too; what judges must not calibrate, so leave it out of one"
            )
