"""Numbers on the page: printed and kept under a name, so that a test can hold them to the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

MINUS = "−"
THIN = "\u202f"


@dataclass(frozen=True)
class Number:
    """A number that stands in the text; as HTML it carries its name and its exact value.

    Parameters
    ----------
    key : str
        Its name in the block of numbers.
    value : int or float
        The exact value.
    text : str
        What is printed.
    """

    key: str
    value: float
    text: str

    def __html__(self) -> Markup:
        return Markup('<data value="{}" data-key="{}">{}</data>').format(
            repr(self.value), self.key, self.text
        )

    def __str__(self) -> str:
        return self.text


class Ledger:
    """Every number that the page prints, by name."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    @property
    def values(self) -> dict[str, float]:
        """All numbers so far, by name."""
        return dict(self._values)

    def _enter(self, key: str, value: float, style: Callable[[float], str]) -> Number:
        plain = int(value) if isinstance(value, int) else float(value)
        if self._values.setdefault(key, plain) != plain:
            raise ValueError(f"{key} is {self._values[key]} and {plain}; give each number one name")
        return Number(key, plain, style(plain))

    def count(self, key: str, value: int) -> Number:
        """A number of things: 12,345."""
        return self._enter(key, int(value), whole)

    def share(self, key: str, value: float) -> Number:
        """A fraction as a percentage: 12.3 %."""
        return self._enter(key, float(value), percent)

    def loss(self, key: str, value: float) -> Number:
        """A loss in nats: 2.345."""
        return self._enter(key, float(value), nats)

    def change(self, key: str, value: float) -> Number:
        """A difference in nats with its sign: +0.123."""
        return self._enter(key, float(value), signed)

    def points(self, key: str, value: float) -> Number:
        """A difference in percentage points with its sign: +1.2."""
        return self._enter(key, float(value), tenths)

    def times(self, key: str, value: float) -> Number:
        """A ratio: 2.4×."""
        return self._enter(key, float(value), ratio)

    def plain(self, key: str, value: float) -> Number:
        """A number of no fixed size, in four digits."""
        return self._enter(key, float(value), four_digits)


def whole(value: float) -> str:
    """12,345."""
    return f"{int(value):,}".replace("-", MINUS)


def percent(value: float) -> str:
    """12.3 %; whole percentages without a decimal, tiny ones with two digits."""
    hundred = 100 * value
    if hundred != 0 and abs(hundred) < 0.095:
        return f"{hundred:.2f}{THIN}%" if abs(hundred) >= 0.01 else f"<{THIN}0.01{THIN}%"
    text = f"{hundred:.1f}".removesuffix(".0")
    return f"{text}{THIN}%".replace("-", MINUS)


def nats(value: float) -> str:
    """2.345."""
    return f"{value:.3f}".replace("-", MINUS)


def signed(value: float) -> str:
    """+0.123, −0.123 or 0.000."""
    text = f"{value:+.3f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def tenths(value: float) -> str:
    """+1.2, −1.2 or 0.0."""
    text = f"{value:+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def ratio(value: float) -> str:
    """2.4×."""
    digits = 1 if value < 10 else 0
    return f"{value:.{digits}f}×"


def four_digits(value: float) -> str:
    """Four significant digits, whole numbers as they are."""
    if value == math.floor(value) and abs(value) < 1e6:
        return whole(value)
    return f"{value:.4g}".replace("-", MINUS)


def sentence(text: str, *numbers: object, **named: object) -> Markup:
    """A sentence with numbers and escaped words put in."""
    return Markup(text).format(*numbers, **named)
