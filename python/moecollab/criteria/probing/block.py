"""One MoE block on the tokens of a probe, run again with any experts masked.

The block's own modules run, with the router cut to the kept experts, so no routing arithmetic is
written here. What can be left out is found by trying: where the block gives the same for tokens
whatever runs beside them, only those that a mask concerns run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moecollab.criteria.probing.probing import Model, Windows, hidden, inputs_of, not_finite
from moecollab.errors import UnsupportedModelError
from moecollab.models.capture import capture
from moecollab.models.keep import router_groups
from moecollab.models.routing import MoeLayer, text_config
from moecollab.progress import track

CHUNK = 8192
"""Tokens that run through a block at once, where windows need not be kept apart."""

HELD = 1 << 30
"""Bytes of blocks' inputs and outputs that are held at once, of one layer at least."""

_CLOSE = {4: 1e-3, 8: 1e-3}  # how far rounding may go, by bytes of a number, relative to a token
_CLOSE_HALF = 0.1
_FEW = 0.01  # tokens that rounding may send to other experts


class _Left(BaseException):
    """Ends a forward after the last block that was wanted."""


@dataclass(frozen=True)
class _Call:
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

    def of(self, hidden: Tensor) -> _Call:
        """The same call with other hidden states."""
        place = self._place
        args = tuple(hidden if key == place else value for key, value in enumerate(self.args))
        kwargs = {key: hidden if key == place else one for key, one in self.kwargs.items()}
        return _Call(args, kwargs)


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def first_of(output: Any) -> Tensor:  # noqa: ANN401 (whatever a block returns)
    """The hidden states that a block returned, alone or first of a tuple."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@dataclass
class Block:
    """What one MoE block was given for some windows, and what it made of it.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    given : list
        The calls, one per window.
    returned : list
        What they returned.
    chosen : list of Tensor of shape (n_tokens, top_k)
        Expert ids, by window; those past the experts are slots that were not used.
    """

    layer: MoeLayer
    given: list[_Call] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def settle(self, checked: Block | None = None) -> Block:
        """Joins the windows, and finds out, or is told, which tokens must run together.

        Raises
        ------
        DataError
            When the block returns what is not finite.
        """
        self.output = torch.cat([_flat(first_of(one)) for one in self.returned])  # (n, hidden)
        if not bool(self.output.isfinite().all()):
            raise not_finite(f"what {self.layer.name} returns")
        self.ids = torch.cat(self.chosen)  # (n, top_k)
        self.starts = np.cumsum([0, *(len(ids) for ids in self.chosen)])
        self.rowwise = self.local = False
        self.hidden = torch.empty(0)
        if all(call.alone for call in self.given):
            self.hidden = torch.cat([_flat(call.hidden) for call in self.given])
            self.rowwise = len(self.hidden) == len(self.ids) == len(self.output)
        if checked is not None:
            self.rowwise, self.local = self.rowwise and checked.rowwise, checked.local
            return self
        self.rowwise = self.rowwise and self._is_rowwise()
        self.local = self.rowwise and self._is_local()
        return self

    def _is_rowwise(self) -> bool:
        """Whether tokens in another order and company come out as they did."""
        everyone = torch.arange(len(self.ids) - 1, -1, -2, device=self.ids.device)
        found, _ = self.run(None, everyone)
        return self._same(found, everyone)

    def _is_local(self) -> bool:
        """Whether a mask concerns only tokens that chose what it hides.

        Not so where weights are shares of what all experts get, chosen or not: the most chosen
        expert has the largest share. Nor where routers choose groups first, by experts that may not
        be chosen.
        """
        count = torch.bincount(self.ids.reshape(-1), minlength=self.layer.n_experts)
        most = int(count[: self.layer.n_experts].argmax())
        others = (self.ids != most).all(dim=1).nonzero()[:, 0]
        few = self.layer.n_experts <= self.layer.top_k
        if few or not len(others) or router_groups(self.layer) > 1:
            return False
        found, _ = self.run(without(self.layer, (most,)), others)
        return self._same(found, others)

    def _same(self, found: Tensor, tokens: Tensor) -> bool:
        """Whether outputs are the recorded ones but for rounding."""
        expected = self.output[tokens].float()
        close = _CLOSE.get(self.output.dtype.itemsize, _CLOSE_HALF)
        off = (found.float() - expected).norm(dim=1) > close * expected.norm(dim=1)
        return int(off.sum()) <= _FEW * len(tokens)

    def concerned(self, experts: Sequence[int], ids: Tensor | None = None) -> Tensor:
        """Tokens whose output may change when some experts are hidden, ascending.

        Parameters
        ----------
        experts : sequence of int
            The hidden experts.
        ids : int64 Tensor of shape (n_tokens, top_k), optional
            What tokens choose before; as recorded if None.
        """
        ids = self.ids if ids is None else ids
        if not self.local:
            return torch.arange(len(ids), device=ids.device)
        hidden = torch.tensor(list(experts), device=ids.device)
        return torch.isin(ids, hidden).any(dim=1).nonzero()[:, 0]

    def run(self, kept: Sequence[int] | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the block makes of some tokens when only some experts can be chosen.

        Parameters
        ----------
        kept : sequence of int, optional
            Experts that can be chosen, ascending; all if None.
        tokens : int64 Tensor of shape (n,)
            Which tokens.

        Returns
        -------
        output : Tensor of shape (n, hidden)
            In the model's type.
        ids : int64 Tensor of shape (n, top_k)
            What they choose.
        """
        if not len(tokens):
            return self.output[tokens], self.ids[tokens]
        with torch.inference_mode(), hidden(self.layer, kept), listening(self.layer) as heard:
            if self.rowwise:
                parts = [self._some(part) for part in torch.split(tokens, CHUNK)]
            else:
                parts = [_flat(first_of(self._whole(call))) for call in self.given]
        found, ids = torch.cat(parts), torch.cat(heard)
        if kept is not None:
            self._check_hidden(ids, kept)
        return (found, ids) if self.rowwise else (found[tokens], ids[tokens])

    def _check_hidden(self, ids: Tensor, kept: Sequence[int]) -> None:
        """Raises UnsupportedModelError if a hidden expert was chosen for want of others."""
        gone = torch.tensor(without(self.layer, kept), device=ids.device)
        if bool(torch.isin(ids, gone).any()):
            raise UnsupportedModelError(
                f"the groups from which the router of layer {self.layer.layer} chooses hold too "
                f"few experts when {len(gone)} are hidden; drop fewer, or use a criterion that "
                "hides none, such as fisher or easy_ep"
            )

    def _some(self, tokens: Tensor) -> Tensor:
        call = self.given[0]
        rows = self.hidden[tokens]
        return _flat(first_of(self._whole(call.of(rows if call.hidden.dim() == 2 else rows[None]))))

    def _whole(self, call: _Call) -> Any:  # noqa: ANN401
        # A copy, since some blocks add to what they are given.
        fresh = call.of(call.hidden.clone())
        return self.layer.block(*fresh.args, **fresh.kwargs)


def without(layer: MoeLayer, dropped: Sequence[int]) -> tuple[int, ...]:
    """All experts of a layer but some."""
    gone = set(dropped)
    return tuple(expert for expert in range(layer.n_experts) if expert not in gone)


def _flat(rows: Tensor) -> Tensor:
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


def blocks_of(model: Model, layers: Sequence[MoeLayer], windows: Windows) -> Iterator[Block]:
    """The blocks of some layers on all windows, as many layers a pass as :data:`HELD` allows."""
    width = int(text_config(model).hidden_size) * int(model.dtype.itemsize)
    each = 2 * width * sum(len(window) for window in windows)
    size = max(1, HELD // each)
    for start in range(0, len(layers), size):
        for block in record(model, layers[start : start + size], windows, whole=False)[0]:
            yield block.settle()


def record(
    model: Model, layers: Sequence[MoeLayer], windows: Windows, *, whole: bool
) -> tuple[list[Block], Any]:
    """What some blocks were given and gave, and the model's last output if the `whole` runs.

    Raises
    ------
    UnsupportedModelError
        When a block does not run once per window.
    """
    blocks = [Block(layer) for layer in layers]
    output = None
    with torch.inference_mode(), ExitStack() as stack, track("reading blocks", len(windows)) as bar:
        for block in blocks:
            stack.enter_context(_watched(block, leave=not whole and block is blocks[-1]))
        for window in windows:
            with suppress(_Left):
                output = model(**inputs_of(model, window))
            bar.advance()
    for block in blocks:
        if not len(block.given) == len(block.returned) == len(block.chosen) == len(windows):
            raise UnsupportedModelError(
                f"{block.layer.name} ran {len(block.given)} times on {len(windows)} windows, so it "
                "cannot be run again by itself; use a criterion that masks nothing, such as easy_ep"
            )
    return blocks, output


@contextmanager
def _watched(block: Block, *, leave: bool) -> Iterator[None]:
    """Writes down what a block is given and gives."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(args, kwargs)
        block.given.append(call.of(call.hidden.clone()))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        copied = first_of(output).clone()  # models go on to add to it in place
        rest = () if isinstance(output, Tensor) else output[1:]
        block.returned.append(copied if isinstance(output, Tensor) else (copied, *rest))
        if leave:
            raise _Left

    with listening(block.layer) as block.chosen:
        handles = [
            block.layer.block.register_forward_pre_hook(before, with_kwargs=True),
            block.layer.block.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
