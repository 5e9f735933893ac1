"""What routers think of experts that they do not choose: probabilities, and who comes next."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.errors import UnsupportedModelError
from moecollab.models.probability import Probability
from moecollab.models.routing import MoeLayer
from moecollab.record.schema import NO_EXPERT

_BIASES = ("correction_bias", "expert_bias", "balancing_biases")


class Mass:
    """Sums of a layer's router probabilities, by domain, and what comes next in each token's.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    shape : tuple of int
        (n_domains, n_experts) of the sums.
    n_next : int
        Experts to name beyond the chosen ones.

    Raises
    ------
    UnsupportedModelError
        When the router chooses by more than probability, so that the next is not known.
    """

    def __init__(self, layer: MoeLayer, shape: tuple[int, int], n_next: int) -> None:
        if n_next and _chooses_otherwise(layer):
            raise UnsupportedModelError(
                f"the router of {layer.name} chooses with a correction bias or by groups, so the "
                'next most probable expert is not its next choice; record without "preferences"'
            )
        self.probability = Probability(layer)
        self.sums = np.zeros(shape)
        self.n_next = n_next
        self.next: NDArray[np.uint16] | None = None

    def add(self, ids: Tensor, weights: Tensor, real: Tensor, domain: Tensor | None) -> None:
        """Adds the probabilities of the real positions of a call."""
        here = real.to(ids.device)
        found = self.probability.of(ids, weights)[here]
        where = torch.zeros_like(real, dtype=torch.int64) if domain is None else domain
        into = torch.from_numpy(self.sums)[:, : found.shape[1]]
        into.index_add_(0, where.cpu()[real.cpu()], found.double().cpu())
        if self.n_next:
            self.next = self._after(found, ids[here], weights[here])

    def _after(self, found: Tensor, ids: Tensor, weights: Tensor) -> NDArray[np.uint16]:
        """The most probable experts that were not chosen, (n_tokens, n_next)."""
        n_experts = found.shape[1]
        # A column more takes what was not used.
        left = torch.nn.functional.pad(found, (0, 1))
        chosen = torch.where((ids < n_experts) & (weights != 0), ids, n_experts).long()
        left = left.scatter(1, chosen, -1)[:, :n_experts]
        value, order = left.topk(min(self.n_next, n_experts), dim=1)
        order = torch.where(value < 0, NO_EXPERT, order)
        padded = torch.nn.functional.pad(order, (0, self.n_next - order.shape[1]), value=NO_EXPERT)
        return padded.cpu().numpy().astype(np.uint16)


def _chooses_otherwise(layer: MoeLayer) -> bool:
    """Whether experts are chosen by more than their probability."""
    biased = any(row.endswith(_BIASES) for row in layer.layout.rows)
    groups = [getattr(layer.router, name, None) or 1 for name in ("n_group", "num_group")]
    return biased or max(groups) > 1
