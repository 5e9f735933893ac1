"""Checks of settings where they enter: kinds of numbers, and names between commas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from moecollab.errors import SettingsError

_NAMES = "a sequence of names, or one text of them between commas"


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int) -> None:
    """Raises SettingsError unless a value is a whole number in [least, 2⁶³)."""
    if not isinstance(value, Integral) or not is_whole(value) or not least <= int(value) < 2**63:
        raise SettingsError(name, value, f"a whole number of at least {least}")


def names_in(name: str, given: object) -> list[str]:
    """The names in a sequence, or in one text between commas; blank ones are left out.

    Raises
    ------
    SettingsError
        When it is something else.

    Examples
    --------
    >>> names_in("domains", "law, code")
    ['law', 'code']
    """
    listed = given.split(",") if isinstance(given, str) else given
    if not isinstance(listed, Iterable) or isinstance(listed, Mapping):
        raise SettingsError(name, given, _NAMES)
    found = []
    for one in listed:
        if not isinstance(one, str):
            raise SettingsError(name, given, _NAMES)
        found.append(one.strip())
    return [one for one in found if one]
