"""The model that the package holds, and the name that stands for it wherever a model is given."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

EMBEDDED = "embedded"
"""Name of the embedded model; a folder of this name is ./embedded."""
MODEL = Path(__file__).parent / "demo" / "model"
"""The embedded model: a stock transformers folder."""

T = TypeVar("T")


def located(model: T) -> T | str:
    """The model as given, or the folder of the embedded one if its name is given.

    Examples
    --------
    >>> located("models/olmoe")
    'models/olmoe'
    >>> located("embedded") == str(MODEL)
    True
    """
    return str(MODEL) if isinstance(model, str) and model == EMBEDDED else model
