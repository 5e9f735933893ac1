"""What is known of a layer's experts before they are merged: from text, or from a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.criteria.probing.everywhere import INPUTS, Everyone
from moecollab.criteria.probing.probing import Model, Windows, inputs_of
from moecollab.models.capture import capture
from moecollab.models.probability import Probability
from moecollab.models.routing import MoeLayer, text_config
from moecollab.pruning.merging.groups import alignments, cosines
from moecollab.record.tallies import Tallies

SAMPLE = 512
"""Tokens on which experts are compared output by output, and neurons by what they make of them."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Recorded:
    """What a recording knows of the experts of one layer.

    Parameters
    ----------
    tallies : Tallies
        Sums over all domains.
    row : int
        Place of the layer among them.
    n_experts : int
        Experts of the layer.
    """

    tallies: Tallies
    row: int
    n_experts: int

    @property
    def counts(self) -> Matrix:
        """Tokens routed to each expert, (n_experts,)."""
        counts: Matrix = self.tallies.count[self.row, : self.n_experts].astype(np.float64)
        return counts

    @property
    def means(self) -> Matrix:
        """Mean output of each expert over those tokens, 0 without any: (n_experts, hidden)."""
        found: Matrix = self.tallies["sum_output"][self.row, : self.n_experts]
        return found / np.maximum(self.counts, 1)[:, None]


class Seen:
    """What one layer does on text: its experts' inputs and outputs, and its router.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    router : bool
        Whether logits and probabilities are wanted too.
    """

    def __init__(self, layer: MoeLayer, *, router: bool) -> None:
        self.layer = layer
        self.everyone = Everyone(layer)
        self.probability = Probability(layer) if router else None
        self._ids: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._logits: list[Tensor] = []

    def attach(self, stack: ExitStack) -> None:
        """Listens until the stack is closed."""
        handles = [] if self.probability is None else [*self.probability.attach()]
        handles += capture(self.layer, self, outputs=False).attach()
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(self.everyone.listening(leave=False))

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        """Keeps what the router chose; a slot that was not used counts for no one."""
        n_experts = self.layer.n_experts
        used = (ids < n_experts) & (weights != 0)
        self._ids.append(torch.where(used, ids.long(), n_experts))
        if self.probability is not None:
            shares, logits = self.probability.read(ids, weights)
            self._shares.append(shares)
            self._logits.append(logits)

    def outputs(self, rows: Tensor, places: Tensor) -> None:
        """Is not listened to."""

    def total(self, routed: Tensor) -> None:
        """Is not listened to."""

    def forget(self, n_tokens: int) -> None:
        """Holds the inputs of some tokens only from now on; what was asked for before stays."""
        self.everyone.rows = [self.sample[:n_tokens].clone()]
        self._ids, self._shares, self._logits = [], [], []

    @property
    def sample(self) -> Tensor:
        """Inputs of evenly spaced tokens, (n, hidden)."""
        rows = torch.cat(self.everyone.rows)
        return rows[:: max(1, -(-len(rows) // SAMPLE))]

    @cached_property
    def chosen(self) -> Tensor:
        """Whether each token was routed to each expert: bool (n_tokens, n_experts)."""
        ids, n_experts = torch.cat(self._ids), self.layer.n_experts
        found = torch.zeros(len(ids), n_experts + 1, dtype=torch.bool, device=ids.device)
        return found.scatter_(1, ids, value=True)[:, :n_experts]

    @cached_property
    def counts(self) -> Matrix:
        """Tokens routed to each expert, (n_experts,)."""
        return _array(self.chosen.sum(dim=0))

    @cached_property
    def routed_means(self) -> Matrix:
        """Mean output of each expert over the tokens routed to it, 0 without any."""
        outputs = torch.cat(list(self.everyone.outputs()), dim=1)  # (n_experts, n_tokens, hidden)
        total = torch.einsum("eth,te->eh", outputs, self.chosen.to(outputs))
        return _array(total) / np.maximum(self.counts, 1)[:, None]

    @cached_property
    def means(self) -> Matrix:
        """Mean output of each expert over all tokens, routed to it or not: (n_experts, hidden)."""
        total = sum(part.sum(dim=1) for part in self.everyone.outputs())
        return _array(torch.as_tensor(total)) / len(self.chosen)

    @cached_property
    def cka(self) -> Matrix:
        """Linear CKA of the outputs on a sample of the tokens, (n_experts, n_experts)."""
        return alignments(_array(self.everyone.outputs_of(self.sample)))

    @cached_property
    def output_cosines(self) -> Matrix:
        """Cosines of the outputs, mean over a sample of the tokens: (n_experts, n_experts)."""
        outputs = _array(self.everyone.outputs_of(self.sample))
        found: Matrix = np.mean([cosines(outputs[:, t]) for t in range(outputs.shape[1])], axis=0)
        return found

    @cached_property
    def logit_cosines(self) -> Matrix:
        """Cosines of the experts' logits along tokens, (n_experts, n_experts)."""
        return cosines(_array(torch.cat(self._logits).T))

    @cached_property
    def gate_cosines(self) -> Matrix:
        """Cosines of the experts' probabilities along tokens, (n_experts, n_experts)."""
        return cosines(_array(torch.cat(self._shares).T))

    @cached_property
    def saliency(self) -> Matrix:
        """REAP: mean of p ‖f‖ over the tokens routed to each expert, p before top-k.

        0 for an expert without tokens; shape (n_experts,).
        """
        norms = torch.cat([part.norm(dim=-1) for part in self.everyone.outputs()], dim=1).T
        weighed = torch.cat(self._shares).to(norms) * norms * self.chosen
        return _array(weighed.sum(dim=0)) / np.maximum(self.counts, 1)


def _array(value: Tensor) -> Matrix:
    found: Matrix = value.detach().double().cpu().numpy()
    return found


def observe(
    model: Model, layers: Sequence[MoeLayer], windows: Windows, *, router: bool
) -> Iterator[Seen]:
    """What each layer does on all windows, as many layers a pass as memory is meant for."""
    width = int(text_config(model).hidden_size) * int(model.dtype.itemsize)
    size = max(1, INPUTS // (width * sum(map(len, windows))))
    for start in range(0, len(layers), size):
        part = [Seen(layer, router=router) for layer in layers[start : start + size]]
        with ExitStack() as stack, torch.inference_mode():
            for one in part:
                one.attach(stack)
            for window in windows:
                model(**inputs_of(model, window))
        yield from part
