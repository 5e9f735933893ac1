"""Repetition measures against strings computed by hand and a slow twin."""

import numpy as np
import pytest

from moecollab.evaluation.repetition import distinct, ends_in_loop, longest_loop, repeated


def slow_loops(ids):
    """Every (start, end) of a phrase of two tokens or more in three whole copies, then longer."""
    for start in range(len(ids)):
        for size in range(2, (len(ids) - start) // 3 + 1):
            phrase, end = list(ids[start : start + size]), start + size
            while end < len(ids) and ids[end] == phrase[(end - start) % size]:
                end += 1
            if end - start >= 3 * size:
                yield start, end


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("abab", 1, 1 / 2),  # a b | a b
        ("ababab", 2, 3 / 5),  # ab ba | ab ba ab
        ("abcabcabc", 4, 3 / 6),  # abca bcab cabc | abca bcab cabc
        ("aaaaaa", 4, 2 / 3),  # aaaa | aaaa aaaa
        ("abcdef", 2, 0),
        ("abc", 4, 0),  # too short for any
        ("", 1, 0),
    ],
)
def test_repeated_by_hand(text, n, expected):
    assert repeated([ord(letter) for letter in text], n) == pytest.approx(expected)


def test_distinct_by_hand():
    """ab bc | ab bd: three bigrams in six tokens; the same text twice halves it."""
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 6
    assert distinct([[1, 2, 3, 4]], 2) == 3 / 4
    assert distinct([[1, 2, 3, 4]] * 2, 2) == 3 / 8
    assert distinct([[], []], 2) == 0


@pytest.mark.parametrize(
    ("text", "loop", "ends"),
    [
        ("the the ", 0, False),  # two copies are none
        ("xabababy", 6, False),
        ("xababab", 6, True),
        ("xabababa", 7, True),  # breaks off within the fourth copy
        ("aaaaa", 0, False),  # a phrase has two tokens: aa aa a
        ("aaaaaa", 6, True),
        ("abcabcabcababab", 11, True),  # abcabcabcab is longer than the ababab at the end
        ("", 0, False),
    ],
)
def test_loops_by_hand(text, loop, ends):
    ids = [ord(letter) for letter in text]
    assert (longest_loop(ids), ends_in_loop(ids)) == (loop, ends)


def test_loops_equal_the_slow_twin():
    rng = np.random.default_rng(0)
    looped = 0
    for _ in range(400):
        ids = rng.integers(0, 2, rng.integers(0, 16)).tolist()
        found = list(slow_loops(ids))
        assert longest_loop(ids) == max((end - start for start, end in found), default=0)
        assert ends_in_loop(ids) == any(end == len(ids) for _start, end in found)
        looped += bool(found)
    assert 20 < looped < 380
