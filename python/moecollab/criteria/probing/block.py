"""One MoE block on the tokens of a probe, run again with any experts masked.

The block's own modules run, with the router cut to the kept experts, so no routing arithmetic is
written here. What can be left out is found by trying: where the block gives the same for tokens
whatever runs beside them, only those that a mask concerns run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecollab.criteria.probing.calls import BlockCall, first_of, flat, listening
from moecollab.criteria.probing.probing import hidden, not_finite
from moecollab.errors import UnsupportedModelError
from moecollab.models.groups import router_groups
from moecollab.models.routing import MoeLayer

CHUNK = 8192
"""Tokens that run through a block at once, where windows need not be kept apart."""

_CLOSE = {4: 1e-3, 8: 1e-3}  # how far rounding may go, by bytes of a number, relative to a token
_CLOSE_HALF = 0.1
_FEW = 0.01  # tokens that rounding may send to other experts


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
    given: list[BlockCall] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def settle(self, checked: Block | None = None) -> Block:
        """Joins the windows, and finds out, or is told, which tokens must run together.

        Raises
        ------
        DataError
            When the block returns what is not finite.
        """
        self.output = torch.cat([flat(first_of(one)) for one in self.returned])  # (n, hidden)
        if not bool(self.output.isfinite().all()):
            raise not_finite(f"what {self.layer.name} returns")
        self.ids = torch.cat(self.chosen)  # (n, top_k)
        self.starts = np.cumsum([0, *(len(ids) for ids in self.chosen)])
        self.rowwise = self.local = False
        self.hidden = torch.empty(0)
        if all(call.alone for call in self.given):
            self.hidden = torch.cat([flat(call.hidden) for call in self.given])
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
        if few or not len(others) or router_groups(self.layer) is not None:
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
                parts = [flat(first_of(self._whole(call))) for call in self.given]
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
        return flat(first_of(self._whole(call.of(rows if call.hidden.dim() == 2 else rows[None]))))

    def _whole(self, call: BlockCall) -> Any:  # noqa: ANN401
        # A copy, since some blocks add to what they are given.
        fresh = call.of(call.hidden.clone())
        return self.layer.block(*fresh.args, **fresh.kwargs)


def without(layer: MoeLayer, dropped: Sequence[int]) -> tuple[int, ...]:
    """All experts of a layer but some."""
    gone = set(dropped)
    return tuple(expert for expert in range(layer.n_experts) if expert not in gone)
