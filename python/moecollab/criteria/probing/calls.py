"""The calls of an MoE block, and what its router chooses in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moecollab.models.capture import capture
from moecollab.models.routing import MoeLayer


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, and where the hidden states are among them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def _place(self) -> int | str:
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return next(key for key, value in named if _is_hidden(value))

    @property
    def hidden(self) -> Tensor:
        """Hidden states, (…, width)."""
        place = self._place
        found: Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return found

    @property
    def alone(self) -> bool:
        """Whether the block is given no other tensors."""
        return sum(isinstance(one, Tensor) for one in (*self.args, *self.kwargs.values())) == 1

    def of(self, hidden: Tensor) -> BlockCall:
        """The same call with other hidden states."""
        place = self._place
        args = tuple(hidden if key == place else value for key, value in enumerate(self.args))
        kwargs = {key: hidden if key == place else one for key, one in self.kwargs.items()}
        return BlockCall(args, kwargs)


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def first_of(output: Any) -> Tensor:  # noqa: ANN401 (whatever a block returns)
    """The hidden states that a block returned, alone or first of a tuple."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def flat(rows: Tensor) -> Tensor:
    """Rows of hidden states: (…, width) to (n, width)."""
    return rows.reshape(-1, rows.shape[-1])


class _Heard(list[Tensor]):
    """Expert ids of each call."""

    def routing(self, ids: Tensor, weights: Tensor) -> None:  # noqa: ARG002
        """Keeps the ids."""
        self.append(ids.long())

    def outputs(self, rows: Tensor, places: Tensor) -> None:
        """Is not listened to."""

    def total(self, routed: Tensor) -> None:
        """Is not listened to."""


@contextmanager
def listening(layer: MoeLayer) -> Iterator[_Heard]:
    """The expert ids that a layer's router chooses while a ``with`` block runs."""
    heard = _Heard()
    handles = capture(layer, heard, outputs=False).attach()
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
