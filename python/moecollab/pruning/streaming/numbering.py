"""Where names of tensors on disk hold the number of an expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Numbered:
    """A name that holds the number of an expert.

    Parameters
    ----------
    before, after : str
        What stands around the number.
    number : int
        The expert.
    """

    before: str
    number: int
    after: str

    def named(self, number: int) -> str:
        """The same name of another expert."""
        return f"{self.before}{number}{self.after}"


def numbered(keys: Iterable[str], n_experts: int) -> dict[str, Numbered]:
    """Keys of one layer that are of single experts, each with its expert.

    The number of an expert is what runs from 0 to `n_experts` - 1, or beyond for experts of
    another kind, while all else stays. What begins like that is told too, if some alone have it.
    """
    places = [place for key in keys for place in _places(key)]
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for _, place in places:
        numbers[place.before, place.after].add(place.number)
    experts = set(range(n_experts))
    full = {
        before
        for (before, _), found in numbers.items()
        if n_experts > 1 and experts <= found and found == set(range(len(found)))
    }
    # The outermost number wins: what an expert itself numbers comes after its own.
    return {key: place for key, place in reversed(places) if place.before in full}


def _places(key: str) -> list[tuple[str, Numbered]]:
    """Every number in a name."""
    parts = key.split(".")
    found = []
    for at, part in enumerate(parts):
        if part.isascii() and part.isdigit() and str(int(part)) == part:
            before = "".join(f"{one}." for one in parts[:at])
            after = "".join(f".{one}" for one in parts[at + 1 :])
            found.append((key, Numbered(before, int(part), after)))
    return found
