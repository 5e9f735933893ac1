"""Collaboration patterns as they are shown: who belongs to them and what they are about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecollab.patterns.collaboration import Collaboration

LETTERS = ("C", "F", "G", "H")
"""First letter of a pattern's name at each level: coarse, fine, finer."""
WINDOW = 44
"""Tokens of an example."""
MEMBER = 0.5
"""Strength from which an expert belongs to a pattern."""


@dataclass(frozen=True)
class About:
    """How much of a pattern's use falls into one domain."""

    domain: str
    share: float
    lift: float
    """Share over the domain's share of the rows that were fitted; 1 is chance."""

    @property
    def chance(self) -> float:
        """The domain's share of the rows."""
        return self.share / self.lift if self.lift > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """A token of an example and how strongly the pattern is at work there, 0 to 4."""

    text: str
    strength: int


@dataclass(frozen=True)
class Link:
    """A pattern of the other level, and its part of this one."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class PatternCard:
    """One pattern with everything a card shows."""

    name: str
    atom: int
    usage: float
    """Share of all use of patterns at this level."""
    members: tuple[tuple[int, int, float], ...]
    """(layer, expert, strength), the layer by the model's own index."""
    domains: tuple[About, ...]
    tokens: tuple[str, ...]
    links: tuple[Link, ...]
    example: tuple[Piece, ...] = ()
    example_domain: str = ""

    @property
    def n_layers(self) -> int:
        """Layers in which the pattern has members."""
        return len({layer for layer, _, _ in self.members})

    @property
    def joins(self) -> bool:
        """Whether it has several experts; a pattern of one says nothing about collaboration."""
        return len(self.members) > 1

    @property
    def top(self) -> About | None:
        """The domain that it is about most, if it leans to one."""
        best = max(self.domains, key=lambda about: about.lift, default=None)
        return best if best is not None and best.lift >= 1.3 else None

    def cells(self, layers: tuple[int, ...]) -> list[tuple[int, int, int, float]]:
        """(row, layer, expert, strength) of every member, to be drawn."""
        return [(layers.index(layer), layer, expert, s) for layer, expert, s in self.members]


@dataclass(frozen=True)
class PatternMap:
    """Patterns by domains.

    Parameters
    ----------
    names : tuple of str
        Patterns, those of one domain together.
    domains : tuple of str
        Domains.
    share, lift : float64 array of shape (n_names, n_domains)
        Share of the pattern's use, and that over the domain's share of rows.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    share: NDArray[np.float64]
    lift: NDArray[np.float64]


def pattern_name(level: int, atom: int) -> str:
    """C12 for atom 12 of the coarse level, F3 for atom 3 of the fine one; levels from 1."""
    return f"{LETTERS[min(level, len(LETTERS)) - 1]}{atom}"


def membership(collab: Collaboration) -> dict[tuple[int, int], tuple[str, ...]]:
    """Names of the live patterns that each (layer, expert) belongs to, the strongest first."""
    found: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for level in range(1, len(collab.levels) + 1):
        for atom in np.flatnonzero(collab.live(level)):
            for layer, expert, strength in collab.members(level, int(atom), MEMBER):
                place = found.setdefault((int(layer), int(expert)), [])
                place.append((-float(strength), pattern_name(level, int(atom))))
    return {site: tuple(name for _, name in sorted(names)) for site, names in found.items()}


def best_window(strength: NDArray[np.float64], sample: NDArray[np.uint32]) -> slice:
    """The stretch of at most 44 tokens of one sample in which a pattern is used most.

    Parameters
    ----------
    strength : float64 array of shape (n_tokens,)
        Use of the pattern.
    sample : uint32 array of shape (n_tokens,)
        Sample of each token, ascending.
    """
    n_tokens = len(strength)
    total = np.concatenate(([0.0], np.cumsum(strength)))
    start = np.arange(n_tokens)
    end = np.searchsorted(sample, sample, side="right")  # first token of the next sample
    stop = np.minimum(start + WINDOW, end)
    best = int(np.argmax(total[stop] - total[start]))
    return slice(best, int(stop[best]))
