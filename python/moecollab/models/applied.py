"""What is on a model for a while, as a mask is, and comes off without a trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from moecollab.models.slicing import Change, undo

_APPLIED = "_moecollab_applied"
"""Where a model says what is on it; a copy of the model says the same."""


class Applied(ABC):
    """A plan that is on a model until :meth:`remove` is called or a ``with`` block ends.

    Parameters
    ----------
    model : Module
        The model, which runs and is watched as before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._noted = False
        self._changes: list[Change] = []
        self._handles: list[RemovableHandle] = []
        try:
            self._apply()
        except BaseException:
            self.remove()
            raise
        vars(model).setdefault(_APPLIED, []).append(self.as_json())
        self._noted = True

    @abstractmethod
    def _apply(self) -> None:
        """Puts hooks and changes on the model."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """What is applied, as plain data."""

    def remove(self) -> None:
        """Restores the very tensors the model had; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        undo(self._changes)
        self._handles, self._changes = [], []
        if self._noted:
            noted = vars(self.model)[_APPLIED]
            noted.remove(self.as_json())
            if not noted:
                del vars(self.model)[_APPLIED]
            self._noted = False

    @property
    def _where(self) -> str:
        """State and model, for a repr."""
        return f"{'on' if self._handles else 'removed from'} {type(self.model).__name__}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()


def applied_to(model: nn.Module) -> list[dict[str, Any]]:
    """All that is on a model now, as plain data in the order in which it was put there."""
    return list(vars(model).get(_APPLIED, ()))
