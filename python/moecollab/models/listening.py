"""Who is told what the experts of a layer do, and what all ways of listening have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moecollab.models.routing import MoeLayer


class Listener(Protocol):
    """Who is told what the experts of one layer do, in this order, once per call."""

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        """Expert ids and the coefficients of their outputs, both (n_positions, top_k).

        An id past the experts, or a weight of 0, is a slot that was not used.
        """

    def outputs(self, rows: Tensor, places: Tensor) -> None:
        """Some outputs before the weights, (n, hidden), to be read at once; each slot comes once.

        `places`, (n,), says which they are: position · top_k + slot.
        """

    def total(self, routed: Tensor) -> None:
        """Weighted sum of the outputs, (n_positions, hidden)."""


class Capture(ABC):
    """Hooks on one layer that leave what the model computes as it is.

    Parameters
    ----------
    layer : MoeLayer
        The layer to listen to.
    listener : Listener
        Who is told.
    outputs : bool
        Whether to listen to expert outputs as well.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        self.layer = layer
        self.listener = listener
        self.wants_outputs = outputs

    @abstractmethod
    def attach(self) -> Sequence[RemovableHandle]:
        """Starts to listen; removing the handles ends it."""
