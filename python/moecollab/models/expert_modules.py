"""Listening to experts that are modules of their own, each called with the rows it gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.routing import INTEGERS, MoeLayer

if TYPE_CHECKING:
    from moecollab.models.capture import Listener


class ModulesCapture:
    """Hooks on a router and on each module of a list of experts.

    Models of before transformers 5, and remote code still, loop over experts and hand each the rows
    of its tokens, in an order that only the block knows. Ids and weights come from the router, or
    from what the layout's `routing` makes of its output. Each expert's rows are found among the
    router's input by their bytes: equal rows have equal outputs, so any of them will do. Rows that
    are not there, or are not as many as the ids say, are an error: then the layout is wrong.

    Parameters
    ----------
    layer, listener, outputs :
        As of :class:`moecollab.models.capture.ContainerCapture`.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        self.layer = layer
        self.listener = listener
        self.wants_outputs = outputs
        self.keys = self.ids = self.weights = torch.empty(0)
        self.rows: dict[int, int] = {}
        self.sum: Tensor | None = None

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks after the router, after every expert and after the block."""
        handles = [self.layer.router.register_forward_hook(self._routed, with_kwargs=True)]
        for number, expert in enumerate(self.layer.experts.children()):
            hook = partial(self._ran, number)
            handles.append(expert.register_forward_hook(hook, with_kwargs=True))
        handles.append(self.layer.block.register_forward_hook(self._done))
        return handles

    def _routed(
        self,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        ids, weights = _read(self.layer, output)
        self.ids = ids.detach().reshape(-1, ids.shape[-1]).clone()
        self.weights = weights.detach().reshape(self.ids.shape).clone()
        self.rows, self.sum = {}, None
        if self.wants_outputs:
            self.keys = _row_keys(_rows(args, kwargs))
        self.listener.routing(self.ids, self.weights.float())

    def _ran(
        self,
        number: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        given = _rows(args, kwargs)
        self.rows[number] = self.rows.get(number, 0) + given.shape[:-1].numel()
        if self.wants_outputs and self.rows[number]:
            self._place(number, given, output.detach().reshape(-1, output.shape[-1]))

    def _place(self, number: int, given: Tensor, output: Tensor) -> None:
        """Tells of an expert's outputs, with the tokens and slots that chose it."""
        token, slot = torch.where(self.ids == number)
        wanted, order = self.keys[token].sort(stable=True)
        found, given_order = _row_keys(given).sort(stable=True)
        if not torch.equal(wanted, found):
            raise self._mismatch(number)
        token, slot, rows = token[order], slot[order], output[given_order]
        self.listener.outputs(rows, token * self.ids.shape[1] + slot)
        if self.sum is None:
            self.sum = output.new_zeros((len(self.ids), output.shape[-1]))
        self.sum.index_add_(0, token, (rows * self.weights[token, slot, None]).to(rows.dtype))

    def _done(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:  # noqa: ANN401
        counts = torch.bincount(self.ids.reshape(-1).long(), minlength=self.layer.n_experts)
        for number, count in enumerate(counts[: self.layer.n_experts].tolist()):
            if self.rows.get(number, 0) != count:
                raise self._mismatch(number)
        if self.sum is not None:
            self.listener.total(self.sum)
        self.sum = None

    def _mismatch(self, number: int) -> DataError:
        return DataError(
            f"expert {number} of {self.layer.name} ran on other rows than its router chose; the "
            f"layout of {self.layer.layout.family!r} does not fit: correct its router or routing"
        )


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with, its first tensor."""
    found: Tensor = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return found.detach()


def _read(layer: MoeLayer, output: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Ids and weights, each (…, top_k), of what a router returned."""
    if layer.layout.routing is not None:
        ids, weights = layer.layout.routing(layer.block, output)
        return ids, weights
    several = output if isinstance(output, tuple | list) else ()
    parts = [part for part in several if isinstance(part, Tensor)]
    ids = next((part for part in parts if part.dtype in INTEGERS and part.dim()), None)
    if ids is not None:
        for part in parts:
            if part.is_floating_point() and part.shape == ids.shape:
                return ids, part
    raise UnsupportedModelError(
        f"the router of {layer.name} returns no ids and weights; register a layout for "
        f"{layer.layout.family!r} with routing=<function of the block and the router's output>"
    )


def _row_keys(rows: Tensor) -> Tensor:
    """A 64-bit key of each row's bytes: (…, hidden) to int64 (n_rows,).

    A sum of products in integers, exact whatever the order, so equal rows have equal keys.
    """
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[flat.dtype.itemsize]
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=draw).to(rows.device)
    # Odd after the shift, so that none of them loses bits.
    return (flat.view(whole).long() * (2 * factors + 1)).sum(dim=1)
