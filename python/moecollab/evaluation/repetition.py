"""How much a text repeats itself: n-grams that come again, and loops that it is caught in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PHRASE = 2
"""Tokens of the shortest phrase whose repetition is a loop."""
COPIES = 3
"""Times in a row that a phrase must stand in a loop."""


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that stood in it before, in [0, 1]; 0 for a text without any.

    Parameters
    ----------
    ids : sequence of int
        Tokens of one text.
    n : int
        Tokens of an n-gram, at least 1.

    Notes
    -----
    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319, section 6): 1 − distinct / all. Differs: a
    text of fewer than n tokens, for which it is not defined, repeats nothing.

    Examples
    --------
    >>> repeated([7, 8, 7, 8, 7], 2)  # 78 87 78 87: two of four are new
    0.5
    """
    found = _ngrams(ids, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams in all texts together, per token, in [0, 1]; 0 for no tokens.

    It falls where a model says the same whatever it is asked, which no text shows alone.

    Notes
    -----
    distinct-n of Li et al. 2016 (arXiv:1510.03055, section 5): scaled by all tokens generated.

    Examples
    --------
    >>> distinct([[1, 2, 3], [1, 2]], 2)  # 12 and 23, in five tokens
    0.4
    """
    total = sum(map(len, texts))
    return len({gram for ids in texts for gram in _ngrams(ids, n)}) / total if total else 0.0


def longest_loop(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch in which one phrase stands at least three times in a row.

    A phrase has at least two tokens; the last copy may be cut short, after three whole ones.

    Examples
    --------
    >>> longest_loop([9, 1, 2, 1, 2, 1, 2, 1, 8]), longest_loop([1, 2, 1, 2])
    (7, 0)
    """
    return max((_longest_run(same) + size for size, same in _periods(ids)), default=0)


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether a text ends in a phrase of two tokens or more that stands there three times.

    Notes
    -----
    Holtzman et al. 2020 (arXiv:1904.09751, figure 9). Differs: after three whole copies the text
    may break off within the next.
    """
    return any(bool(same[-(COPIES - 1) * size :].all()) for size, same in _periods(ids))


def _periods(ids: Sequence[int]) -> list[tuple[int, NDArray[np.bool_]]]:
    """Sizes of phrases that loop somewhere, and which tokens equal those one phrase before."""
    text = np.asarray(ids)
    sizes = range(PHRASE, len(text) // COPIES + 1)
    found = [(size, text[size:] == text[:-size]) for size in sizes]
    return [(size, same) for size, same in found if _longest_run(same) >= (COPIES - 1) * size]


def _longest_run(same: NDArray[np.bool_]) -> int:
    """Length of the longest run of True."""
    breaks = np.flatnonzero(~same)
    edges = np.concatenate(([-1], breaks, [len(same)]))
    return int(np.diff(edges).max()) - 1


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
