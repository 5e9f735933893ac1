"""Listening to experts that are modules of their own, each called with the rows it gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.adding_up import Beside, WeightedSum, tensors_of
from moecollab.models.layout import Layout
from moecollab.models.listening import Capture, Listener
from moecollab.models.routing import INTEGERS, MoeLayer

_ADD_UP: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()
"""Blocks whose experts were found to add up, with the layout that says how."""


class ModulesCapture(Capture):
    """Hooks on a router and on each module of a list of experts.

    Models of before transformers 5, and remote code still, loop over experts and hand each the rows
    of its tokens, in an order that only the block knows. Ids and weights come from the router, or
    from what the layout's `routing` makes of its output. Each expert's rows are found among the
    router's input, or the block's, by their bytes: equal rows have equal outputs, so any of them
    will do. Rows that are not there, or are not as many as the ids say, are an error, and so are
    outputs that do not add up to what the block returns at its first call: the layout is wrong.
    """

    def __init__(self, layer: MoeLayer, listener: Listener, *, outputs: bool) -> None:
        super().__init__(layer, listener, outputs=outputs)
        self.ids: Tensor | None = None
        self.weights = torch.empty(0)
        self.given: list[Tensor] = []
        self.keys: dict[tuple[int, torch.dtype], Tensor] = {}
        self.rows: dict[int, int] = {}
        self.sum: Tensor | None = None
        self.check: WeightedSum | None = None
        self.beside = Beside(layer)

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks around the block, after the router and after every expert."""
        block, router = self.layer.block, self.layer.router
        handles = [
            block.register_forward_pre_hook(self._begin, with_kwargs=True),
            router.register_forward_hook(self._routed, with_kwargs=True),
        ]
        if not self._is_checked():
            handles += self.beside.attach()
        for number, expert in enumerate(self.layer.experts.children()):
            hook = partial(self._ran, number)
            handles.append(expert.register_forward_hook(hook, with_kwargs=True))
        return [*handles, block.register_forward_hook(self._done)]

    def _is_checked(self) -> bool:
        """Whether nothing is left to check: it was, or the block does not return the sum."""
        layout = self.layer.layout
        return bool(layout.shift) or _ADD_UP.get(self.layer.block) == layout

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = tensors_of((*args, *kwargs.values()))[:1]
        self.ids, self.sum, self.check, self.rows, self.keys = None, None, None, {}, {}
        if not self._is_checked():
            self.beside.begin(*self.given)

    def _routed(
        self,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        ids, weights = read_routing(self.layer, output)
        self.ids = ids.detach().reshape(-1, ids.shape[-1]).clone()
        self.weights = weights.detach().reshape(self.ids.shape).clone()
        self.given = [*tensors_of((*args, *kwargs.values()))[:1], *self.given]
        self.beside.also(*self.given[:1])
        self.check = None if self._is_checked() else WeightedSum(self.weights)
        self.listener.routing(self.ids, self.weights.float())

    def _ran(
        self,
        number: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        given, returned = tensors_of((*args, *kwargs.values())), tensors_of(output)
        if self.ids is None or not given or not returned:
            raise self._mismatch(number)
        self.beside.routed()
        n_rows = given[0].shape[:-1].numel()
        self.rows[number] = self.rows.get(number, 0) + n_rows
        if n_rows and (self.wants_outputs or self.check is not None):
            self._tell(returned[0].reshape(-1, returned[0].shape[-1]), number, given[0])

    def _places(self, number: int, given: Tensor) -> tuple[Tensor, Tensor] | None:
        """Places of the tokens and slots that chose an expert, and which of its rows each has."""
        token, slot = torch.where(self._chosen() == number)
        found, order = _row_keys(given).sort(stable=True)
        for which in range(len(self.given)):
            keys = self._keys_of(which, given.dtype)
            if len(keys) == len(self._chosen()):
                wanted, back = keys[token].sort(stable=True)
                if torch.equal(wanted, found):
                    return (token * self._chosen().shape[1] + slot)[back], order
        return None

    def _chosen(self) -> Tensor:
        """Expert ids of this call, (n_positions, top_k)."""
        return torch.empty(0) if self.ids is None else self.ids

    def _keys_of(self, which: int, dtype: torch.dtype) -> Tensor:
        """Keys of the rows that the router, or the block, was given, in the experts' type."""
        if (which, dtype) not in self.keys:
            self.keys[which, dtype] = _row_keys(self.given[which].to(dtype))
        return self.keys[which, dtype]

    def _tell(self, output: Tensor, number: int, given: Tensor) -> None:
        """Tells of an expert's outputs and adds them up."""
        found = self._places(number, given)
        if found is None and self.wants_outputs:
            raise self._misplaced(number, given)
        if found is None:  # how many rows there are is checked all the same
            self.check = None
            return
        places, order = found
        rows = output[order]
        if self.check is not None:
            self.check.add(rows, places)
        if not self.wants_outputs:
            return
        self.listener.outputs(rows, places)
        if self.sum is None:
            self.sum = output.new_zeros((len(self.weights), output.shape[-1]))
        parts = rows * self.weights.reshape(-1, 1)[places]
        self.sum.index_add_(0, places // self.weights.shape[1], parts.to(rows.dtype))

    def _done(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        counts = torch.bincount(self._chosen().reshape(-1).long(), minlength=self.layer.n_experts)
        for number, count in enumerate(counts[: self.layer.n_experts].tolist()):
            if self.rows.get(number, 0) != count:
                raise self._mismatch(number)
        self._check(output)
        if self.sum is not None:
            self.listener.total(self.sum)
        self.sum = None

    def _check(self, output: Any) -> None:  # noqa: ANN401
        """Compares the block's first output with what was told."""
        check, self.check = self.check, None
        if check is None:
            return
        right = self.beside.explains(check, output, self.layer.scale)
        self.beside.end()
        if right is False:
            raise UnsupportedModelError(
                f"{self.layer.name} does not return the outputs of its experts times the weights "
                f"that the layout of {self.layer.layout.family!r} gives; correct its `routing` "
                "(renormalised? a factor?) or name a factor after the sum in `scale`, or, if "
                "something else follows the sum, say what in `shift`"
            )
        if right:
            _ADD_UP[self.layer.block] = self.layer.layout

    def _misplaced(self, number: int, given: Tensor) -> DataError:
        known = [self._keys_of(which, given.dtype) for which in range(len(self.given))]
        if bool(torch.isin(_row_keys(given), torch.cat(known)).all()):
            return self._mismatch(number)
        return DataError(
            f"expert {number} of {self.layer.name} ran on rows that neither the router nor the "
            "block was given, so its outputs are no token's; record without norms"
        )

    def _mismatch(self, number: int) -> DataError:
        return DataError(
            f"expert {number} of {self.layer.name} ran on other rows than its router chose; the "
            f"layout of {self.layer.layout.family!r} does not fit: correct its router or routing"
        )


def read_routing(layer: MoeLayer, output: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Ids and weights, each (…, top_k), of what a router returned."""
    if layer.layout.routing is not None:
        return _routing(layer, output)
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


def _routing(layer: MoeLayer, output: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What the layout's own function makes of a router's output."""
    name, function = f"the `routing` of the layout of {layer.layout.family!r}", layer.layout.routing
    try:
        ids, weights = function(layer.block, output)  # type: ignore[misc]  # it is not None here
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as cause:
        raise UnsupportedModelError(
            f"{name} fails on {layer.name}: {cause}; it gets the block and what its router "
            "returned, and gives ids and weights"
        ) from cause
    tensors = isinstance(ids, Tensor) and isinstance(weights, Tensor)
    if not tensors or ids.dtype not in INTEGERS or ids.shape != weights.shape:
        raise UnsupportedModelError(
            f"{name} must give two tensors (n_positions, top_k), integer ids and their weights"
        )
    return ids, weights


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
