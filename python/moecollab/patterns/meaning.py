"""What patterns are about: domains, tokens and examples."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moecollab.errors import DataError, SettingsError
from moecollab.patterns.collaboration import Collaboration
from moecollab.record.activations import Activations

MIN_COUNT = 5
"""Occurrences below which a token says nothing about a pattern."""
PRIOR = 5.0
"""Occurrences at the mean use that are added to each token, so that rare ones do not lead."""
EXAMPLES = 3
WINDOW = 12
"""Tokens shown on either side of an example's strongest token."""

_STRENGTHS = pl.List(pl.Struct({"layer": pl.UInt32, "expert": pl.UInt32, "strength": pl.Float64}))
_DOMAINS = pl.List(pl.Struct({"domain": pl.String, "share": pl.Float64, "lift": pl.Float64}))
_TOKENS = pl.List(pl.Struct({"token": pl.String, "lift": pl.Float64, "count": pl.Int64}))
SCHEMA = {
    "atom": pl.UInt32(),
    "usage": pl.Float64(),
    "members": _STRENGTHS,
    "domains": _DOMAINS,
    "tokens": _TOKENS,
    "examples": pl.List(pl.String),
}
"""Columns of the table that :func:`describe` returns."""


def describe(
    collab: Collaboration, acts: Activations, level: int = 1, top: int = 8
) -> pl.DataFrame:
    """A row for every atom of a level that is in use, the most used first.

    Parameters
    ----------
    collab : Collaboration
        Patterns fitted on these activations.
    acts : Activations
        What the routers did.
    level : int
        Level, from 1.
    top : int
        Tokens listed at most.

    Returns
    -------
    polars.DataFrame
        - atom; usage, its share of all use
        - members (layer, expert, strength), the strongest first
        - domains (domain, its share of the atom's use, lift = that over the domain's share of
          rows), the highest lift first
        - tokens (token, lift = mean use on it over mean use anywhere, drawn towards 1 for rare
          ones, count), the highest lift first, of those seen at least 5 times
        - examples, up to 3 contexts from different samples, the strongest token between » and «

        When the rows of the fit were samples, a token's use of an atom is not known from codes;
        the part of its routed weight that goes to the atom's members stands for it (`TokenUse`).

    Raises
    ------
    DataError
        When the collaboration has another number of rows than the activations.
    """
    if top < 1:
        raise SettingsError("top", top, "at least 1")
    use = TokenUse(collab, acts)
    alive = np.flatnonzero(collab.live(level)).tolist()
    usage = collab.levels[level - 1].usage
    domains, words = _Domains(acts, per_token=use.per_token), _Words(acts)
    rows = []
    for atom in sorted(alive, key=lambda atom: (-usage[atom], atom)):
        strength = row_strength(collab, level, atom)
        on_tokens = use.of(level, atom)
        rows.append(
            {
                "atom": atom,
                "usage": float(usage[atom] / usage.sum()),
                "members": _members(collab, level, atom),
                "domains": domains.about(strength),
                "tokens": words.about(on_tokens, top),
                "examples": words.examples(on_tokens),
            }
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def row_strength(collab: Collaboration, level: int, atom: int) -> NDArray[np.float64]:
    """How much each row uses one atom: float64 array of shape (n_rows,).

    At finer levels through the codes of the levels above.
    """
    n_atoms = len(collab.levels[level - 1].atoms)
    factor = np.zeros(n_atoms)
    factor[atom] = 1.0
    for finer in range(level, 1, -1):
        links = collab.levels[finer - 1].links
        if links is not None:
            factor = links.astype(np.float64) @ factor
    codes = collab.codes
    used = np.flatnonzero(factor[codes.atom] > 0)
    row = np.searchsorted(codes.indptr, used, side="right") - 1
    value = codes.value[used] * factor[codes.atom[used]]
    found: NDArray[np.float64] = np.bincount(row, value, codes.n_rows).astype(np.float64)
    return found


class TokenUse:
    """How much each token uses an atom, whatever the rows of the fit were.

    Parameters
    ----------
    collab : Collaboration
        Patterns fitted on these activations, on rows that are tokens or samples.
    acts : Activations
        What the routers did.

    Raises
    ------
    DataError
        When the collaboration has another number of rows than the activations.
    """

    def __init__(self, collab: Collaboration, acts: Activations) -> None:
        if collab.n_rows not in (acts.n_tokens, acts.n_samples):
            raise DataError(
                f"the collaboration has {collab.n_rows} rows, but the activations have "
                f"{acts.n_tokens} tokens in {acts.n_samples} samples; fit it on these activations"
            )
        self.collab = collab
        self.per_token = collab.n_rows == acts.n_tokens
        if not self.per_token:
            rows = acts.rows("token", "renormalised")
            self._sites, self._values = rows.sites, rows.values.astype(np.float64)
            self._row = np.repeat(np.arange(acts.n_tokens), np.diff(rows.indptr))
            self._n_tokens = acts.n_tokens

    def of(self, level: int, atom: int) -> NDArray[np.float64]:
        """Use of one atom: float64 array of shape (n_tokens,).

        Its code where rows are tokens; else the token's renormalised weight on the atom's members,
        each times its strength, over the sum of strengths.
        """
        if self.per_token:
            return row_strength(self.collab, level, atom)
        member = self.collab.levels[level - 1].atoms[atom].astype(np.float64)
        weighted = self._values * member[self._sites]
        found = np.bincount(self._row, weighted, self._n_tokens) / max(member.sum(), 1e-300)
        return np.asarray(found, dtype=np.float64)


def _members(collab: Collaboration, level: int, atom: int) -> list[dict[str, object]]:
    members = sorted(collab.members(level, atom), key=lambda member: -member[2])
    return [
        {"layer": layer, "expert": expert, "strength": strength}
        for layer, expert, strength in members
    ]


class _Domains:
    """Domains of the rows."""

    def __init__(self, acts: Activations, *, per_token: bool) -> None:
        samples = acts.samples()
        self.names = acts.domains
        number = {name: place for place, name in enumerate(self.names)}
        of_sample = np.array([number[name] for name in samples["domain"].to_list()], np.int64)
        self.of_row = of_sample[acts.tokens()["sample"].to_numpy()] if per_token else of_sample
        rows = np.bincount(self.of_row, minlength=len(self.names))
        self.expected = rows / rows.sum()

    def about(self, strength: NDArray[np.float64]) -> list[dict[str, object]]:
        """Domains in which an atom is used, the highest lift first."""
        use = np.bincount(self.of_row, strength, len(self.names))
        share = use / max(use.sum(), np.finfo(np.float64).tiny)
        lift = np.divide(share, self.expected, out=np.zeros_like(share), where=self.expected > 0)
        return [
            {"domain": self.names[at], "share": float(share[at]), "lift": float(lift[at])}
            for at in np.argsort(-lift, kind="stable").tolist()
            if share[at] > 0
        ]


class _Words:
    """Texts of the tokens."""

    def __init__(self, acts: Activations) -> None:
        tokens, vocabulary = acts.tokens(), acts.vocabulary()
        ids, self.word = np.unique(tokens["token_id"].to_numpy(), return_inverse=True)
        self.text = [vocabulary[token] for token in ids.tolist()]
        self.sample = tokens["sample"].to_numpy()
        self.count = np.bincount(self.word, minlength=len(ids))

    def about(self, strength: NDArray[np.float64], top: int) -> list[dict[str, object]]:
        """Tokens on which an atom is used more than elsewhere."""
        anywhere = max(float(strength.mean()), np.finfo(np.float64).tiny)
        use = np.bincount(self.word, strength, len(self.text))
        lift = (use / anywhere + PRIOR) / (self.count + PRIOR)
        lift[self.count < MIN_COUNT] = 0.0
        return [
            {"token": self.text[at], "lift": float(lift[at]), "count": int(self.count[at])}
            for at in np.argsort(-lift, kind="stable")[:top].tolist()
            if lift[at] > 1
        ]

    def examples(self, strength: NDArray[np.float64]) -> list[str]:
        """Contexts of the strongest tokens of different samples."""
        found: list[str] = []
        seen: set[int] = set()
        for at in np.argsort(-strength, kind="stable").tolist():
            if len(found) == EXAMPLES or strength[at] <= 0:
                break
            if int(self.sample[at]) not in seen:
                seen.add(int(self.sample[at]))
                found.append(self._context(at))
        return found

    def _context(self, at: int) -> str:
        start = int(np.searchsorted(self.sample, self.sample[at], side="left"))
        end = int(np.searchsorted(self.sample, self.sample[at], side="right"))
        first, last = max(start, at - WINDOW), min(end, at + WINDOW + 1)
        before, after = self._join(first, at), self._join(at + 1, last)
        return f"{before}»{self._join(at, at + 1)}«{after}"

    def _join(self, first: int, last: int) -> str:
        return "".join(self.text[word] for word in self.word[first:last].tolist())
