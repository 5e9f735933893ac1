"""The levels of a collaboration as the page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moecollab.patterns.collaboration import Collaboration
from moecollab.patterns.meaning import TokenUse, describe
from moecollab.record.activations import Activations
from moecollab.reporting.pattern_cards import (
    About,
    Link,
    PatternCard,
    PatternMap,
    Piece,
    best_window,
    pattern_name,
)

CARDS = (9, 6)
"""Cards of the coarse level and of each finer one."""
TOKENS = 16
"""Tokens that are asked for; those that look alike are shown once."""
RELATIVES = 4
"""Patterns of the other level that a card names."""
MAPPED = 24
"""Patterns in the map by domain."""
TITLES = ("Coarse", "Fine", "Finer", "Finest")
STEPS = (0.2, 0.4, 0.6, 0.8)
"""Shares of the strongest use from which a token is marked, more and more."""


@dataclass(frozen=True, kw_only=True)
class LevelView:
    """One level: all live patterns, and those that get a card."""

    level: int
    n_levels: int
    n_atoms: int
    all_cards: tuple[PatternCard, ...]
    """The most used first."""
    cards: tuple[PatternCard, ...]
    """Those of several experts before the others."""

    @property
    def title(self) -> str:
        """Coarse, fine and so on; nothing special for a lone level."""
        return TITLES[min(self.level, len(TITLES)) - 1] if self.n_levels > 1 else "All"

    @property
    def n_live(self) -> int:
        """Patterns that are used at all."""
        return len(self.all_cards)

    @property
    def n_joined(self) -> int:
        """Patterns of several experts."""
        return sum(card.joins for card in self.all_cards)

    @property
    def mapped(self) -> tuple[PatternCard, ...]:
        """Patterns in the map by domain."""
        return _joined_first(self.all_cards)[:MAPPED]

    @property
    def figure(self) -> str:
        """Name of the level's map by domain."""
        return f"patterns-{self.level}"

    @property
    def link_words(self) -> str:
        """How the links of a card are introduced."""
        return "made of" if self.level == 1 else "part of"

    def key(self, card: PatternCard) -> str:
        """How the numbers of a card are called."""
        return f"patterns.{self.level}.{card.atom}"

    def by_domain(self, shown: Sequence[str]) -> PatternMap:
        """Mapped patterns by domain, those of one domain together."""
        cards = self.mapped
        shape = (len(cards), len(shown))
        share, lift = np.zeros(shape), np.zeros(shape)
        for row, card in enumerate(cards):
            for about in card.domains:
                if about.domain in shown:
                    column = shown.index(about.domain)
                    share[row, column], lift[row, column] = about.share, about.lift
        order = np.lexsort((-lift.max(axis=1), lift.argmax(axis=1)))
        names = tuple(cards[row].name for row in order)
        return PatternMap(names, tuple(shown), share[order], lift[order])


def level_views(collab: Collaboration, acts: Activations) -> tuple[LevelView, ...]:
    """Every level with its patterns, the most used first."""
    vocabulary = acts.vocabulary()
    tokens = acts.tokens()
    text = [vocabulary[token] for token in tokens["token_id"].to_list()]
    sample = tokens["sample"].to_numpy()
    domain = acts.samples()["domain"].to_list()
    use = TokenUse(collab, acts)
    found = []
    for level in range(1, len(collab.levels) + 1):
        cards, most = _cards(collab, acts, level), CARDS[min(level, len(CARDS)) - 1]
        shown = tuple(
            _with_example(card, use.of(level, card.atom), text, sample, domain)
            for card in _joined_first(cards)[:most]
        )
        found.append(
            LevelView(
                level=level,
                n_levels=len(collab.levels),
                n_atoms=len(collab.levels[level - 1].atoms),
                all_cards=cards,
                cards=shown,
            )
        )
    return tuple(found)


def _cards(collab: Collaboration, acts: Activations, level: int) -> tuple[PatternCard, ...]:
    """All patterns in use, the most used first, without examples."""
    return tuple(
        PatternCard(
            name=pattern_name(level, row["atom"]),
            atom=row["atom"],
            usage=row["usage"],
            members=tuple((m["layer"], m["expert"], m["strength"]) for m in row["members"]),
            domains=tuple(About(d["domain"], d["share"], d["lift"]) for d in row["domains"]),
            tokens=_distinct(token["token"] for token in row["tokens"]),
            links=tuple(
                Link(pattern_name(other, atom), part)
                for other, atom, part in collab.links(level, row["atom"])[:RELATIVES]
            ),
        )
        for row in describe(collab, acts, level, top=TOKENS).iter_rows(named=True)
    )


def _joined_first(cards: tuple[PatternCard, ...]) -> tuple[PatternCard, ...]:
    """Patterns of several experts before the others, else as they were."""
    return tuple(sorted(cards, key=lambda card: not card.joins))


def _distinct(tokens: Iterable[str]) -> tuple[str, ...]:
    """Tokens that a person can tell apart, in order."""
    return tuple(dict.fromkeys(text for token in tokens if (text := token.strip())))


def _with_example(
    card: PatternCard,
    strength: NDArray[np.float64],
    text: Sequence[str],
    sample: NDArray[np.uint32],
    domain: Sequence[str],
) -> PatternCard:
    """The card with the stretch of text in which the pattern is used most."""
    place = best_window(strength, sample)
    top = max(float(strength[place].max()), np.finfo(np.float64).tiny)
    steps = np.digitize(strength[place] / top, STEPS)
    pieces = [Piece(_one_line(text[place][i]), int(step)) for i, step in enumerate(steps)]
    return replace(card, example=tuple(pieces), example_domain=domain[int(sample[place.start])])


def _one_line(text: str) -> str:
    """A token's text without line breaks."""
    return " ".join(text.splitlines()) if text.strip() else " "
