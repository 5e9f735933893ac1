"""Whether what is told of experts adds up to what the model computes: looked at once, at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.models.routing import MoeLayer

_ROWS = 256
_ROUNDINGS = 4  # units in the last place of the coarsest type: twice what 64 parts come to
_LEAST = 1e-3  # of products that a GPU takes of float32 in fewer bits


class WeightedSum:
    """Weighted sum of expert outputs in float32, and how large what was added is.

    Parameters
    ----------
    weights : Tensor of shape (n_positions, top_k)
        Coefficients of the outputs.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.rows: Tensor | None = None  # (n_positions, hidden)
        self.sizes = torch.empty(0)  # (n_positions, 1): squared norms of what was added, summed
        self.precision = torch.finfo(weights.dtype).eps

    def add(self, rows: Tensor, places: Tensor) -> None:
        """Adds outputs (n, hidden) at places (n,), position · top_k + slot."""
        n_positions, top_k = self.weights.shape
        if self.rows is None:
            self.rows = rows.new_zeros((n_positions, rows.shape[-1]), dtype=torch.float32)
            self.sizes = self.rows.new_zeros((n_positions, 1))
            self.precision = max(self.precision, torch.finfo(rows.dtype).eps)
        places = places.to(self.weights.device)
        weights = self.weights.reshape(-1)[places].to(rows.device).float()
        # A place that is not used may hold anything.
        parts = torch.where(weights[:, None] != 0, rows.float() * weights[:, None], 0)
        parts, position = parts.to(self.rows.device), (places // top_k).to(self.rows.device)
        self.rows.index_add_(0, position, parts)
        self.sizes.index_add_(0, position, parts.square().sum(dim=1, keepdim=True))


class Beside:
    """What a block computes besides its routed experts, such as shared ones, at a few positions.

    That is the block's input, and what modules returned that ran before the last expert or were
    given what the block or its router was given; what runs on the sum is not beside it.

    Parameters
    ----------
    layer : MoeLayer
        The layer whose block it is.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self.layer = layer
        self.given: list[Tensor] = []
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._before = 0
        self._listening = False

    def attach(self) -> list[RemovableHandle]:
        """Hooks on all modules of the block but the router, the experts and what holds them."""
        layer = self.layer
        inner = {id(one) for part in (layer.router, layer.experts) for one in part.modules()}
        beside = [
            one
            for one in layer.block.modules()
            if id(one) not in inner and inner.isdisjoint(id(part) for part in one.modules())
        ]
        return [one.register_forward_hook(self._ran, with_kwargs=True) for one in beside]

    def begin(self, *given: Tensor) -> None:
        """Forgets what was heard, and listens to a call of the block."""
        self.given, self._heard, self._before = [_some(rows) for rows in given], [], 0
        self._listening = True

    def end(self) -> None:
        """Listens no more, and keeps nothing."""
        self.begin()
        self._listening = False

    def also(self, *given: Tensor) -> None:
        """Adds what the router was given."""
        if self._listening:
            self.given += [_some(rows) for rows in given]

    def routed(self) -> None:
        """Says that an expert runs, so that all before is beside the sum."""
        self._before = len(self._heard)

    def _ran(
        self,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        if self._listening:
            given = tensors_of((*args, *kwargs.values()))
            first = _some(given[0]) if given else torch.empty(0)
            self._heard += [(first, _some(found)) for found in tensors_of(output)]

    def explains(self, routed: WeightedSum, output: Any, scale: float) -> bool | None:  # noqa: ANN401
        """Whether a block returned the sum and, at each position, a combination of what is beside.

        Parameters
        ----------
        routed : WeightedSum
            What was told.
        output : Tensor, or tuple with one
            What the block returned.
        scale : float
            The block's factor on the sum.

        Returns
        -------
        bool or None
            None where no position is finite, or no expert ran.
        """
        if routed.rows is None:
            return None
        told, size = _some(routed.rows), _some(routed.sizes)[:, 0]
        ends = [end for end in map(_some, tensors_of(output)) if end.shape == told.shape]
        if not ends:
            return False
        off = ends[0].double() - scale * told.double()
        size = ends[0].double().square().sum(dim=1) + scale**2 * size
        basis = [one.double() for one in self._others() if one.shape == told.shape]
        sound = torch.stack([off, *basis]).isfinite().all(dim=2).all(dim=0)  # padding may be NaN
        if not bool(sound.any()):
            return None
        precision = max(routed.precision, torch.finfo(ends[0].dtype).eps)
        rounding = max(_LEAST, _ROUNDINGS * precision) * size.sqrt()
        left = _left(off[sound], [one[sound] for one in basis]).norm(dim=1)
        return not bool((left > rounding[sound]).any())

    def _others(self) -> list[Tensor]:
        """What was heard that is beside the sum."""
        after = self._heard[self._before :]
        same = [out for given, out in after if any(_equal(given, one) for one in self.given)]
        return [*self.given, *(out for _, out in self._heard[: self._before]), *same]


def tensors_of(found: Any) -> list[Tensor]:  # noqa: ANN401 (whatever a module is given or returns)
    """Tensors of floating point with rows, in a tensor or a sequence."""
    parts = found if isinstance(found, tuple | list) else (found,)
    return [one.detach() for one in parts if isinstance(one, Tensor) and _has_rows(one)]


def _has_rows(found: Tensor) -> bool:
    return found.is_floating_point() and found.dim() > 1


def _some(rows: Tensor) -> Tensor:
    """Up to 512 rows of (…, width), evenly spaced; a copy, since models add in place."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat[:: max(1, len(flat) // _ROWS)].to("cpu", copy=True)


def _equal(rows: Tensor, others: Tensor) -> bool:
    return torch.equal(rows.float().nan_to_num(), others.float().nan_to_num())


def _left(rows: Tensor, others: Sequence[Tensor]) -> Tensor:
    """What no combination of others, row by row, makes of rows: (n, width)."""
    if not others:
        return rows
    basis = torch.stack(list(others), dim=-1)  # (n, width, n_others)
    best: Tensor = torch.linalg.lstsq(basis, rows[..., None]).solution
    return rows - (basis @ best)[..., 0]
