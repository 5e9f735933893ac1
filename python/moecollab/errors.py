"""Exceptions of moecollab; every error a user can cause is one of these.

::

    MoeCollabError(Exception)
    ├── SettingsError(ValueError)       a parameter is out of range
    ├── DataError(ValueError)           input is empty, not finite, damaged or of the wrong kind
    │   ├── ShapeError                  an array has the wrong shape
    │   └── SchemaError                 a file has the wrong columns, types or version
    ├── UnsupportedModelError           the model is dense or its MoE family is unknown
    ├── MissingInputError(ValueError)   a criterion or report lacks something it needs
    ├── PlanError(ValueError)           a plan cannot be carried out on this model
    ├── StaleInputError                 a file was made from other inputs than those given
    └── OutputExistsError               the output is there and ``overwrite`` was not given

    ConvergenceWarning(UserWarning)     a fit stopped before its tolerance was met
    CalibrationWarning(UserWarning)     seeds of a comparison calibrate on the same documents
"""

from __future__ import annotations

from collections.abc import Sequence

SHARE = "a share between 0 and 1; for 25 % write 0.25"
"""What a fraction of experts or documents must be, in an error."""


class MoeCollabError(Exception):
    """Base of every error raised by moecollab."""


class SettingsError(MoeCollabError, ValueError):
    """Raised when a parameter is out of range, before any work."""

    def __init__(self, name: str, got: object, allowed: str) -> None:
        super().__init__(f"{name} is {got!r}; it must be {allowed}")
        self.name = name
        self.got = got
        self.allowed = allowed

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Pickles by fields, since the message is made from them."""
        return type(self), (self.name, self.got, self.allowed)


class DataError(MoeCollabError, ValueError):
    """Raised when input is empty, not finite, damaged or of the wrong kind."""


class ShapeError(DataError):
    """Raised when an array has the wrong shape, dtype or layout."""


class SchemaError(DataError):
    """Raised when a file has the wrong columns, types or format version."""


class UnsupportedModelError(MoeCollabError):
    """Raised when a model is dense or its MoE family is not known."""


class MissingInputError(MoeCollabError, ValueError):
    """Raised when something is asked for whose inputs were not recorded or given."""


class PlanError(MoeCollabError, ValueError):
    """Raised when a plan cannot be made or carried out, with the layer that forbids it."""


class StaleInputError(MoeCollabError):
    """Raised when a file was made from other inputs than the ones given now."""


class OutputExistsError(MoeCollabError):
    """Raised when an output is there already and ``overwrite`` was not given."""

    def __init__(self, path: object) -> None:
        super().__init__(f"{path} exists; choose another output or pass overwrite (--overwrite)")
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Pickles by fields, since the message is made from them."""
        return type(self), (self.path,)


class CalibrationWarning(UserWarning):
    """Given when the seeds of a comparison calibrate on the same documents."""


class ConvergenceWarning(UserWarning):
    """Issued when a fit stopped before its tolerance was met."""


def unknown_name(kind: str, name: str, known: Sequence[str]) -> SettingsError:
    """The error for an unknown name, with near matches first and then all names."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    hint = f"a known one; did you mean {', '.join(near)}? All: " if near else "one of: "
    return SettingsError(kind, name, hint + ", ".join(sorted(known)))
