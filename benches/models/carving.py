"""Carves a dense feed-forward layer into shared and routed experts, in closed form.

The method: neurons that many tokens need become the shared expert, the others are clustered by the
tokens they serve; a ridge regression gives the router, another refits the down projections under
the true routing weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moecollab.errors import SettingsError

SHARED_GATE = 0.5
"""Qwen2-MoE multiplies its shared expert by sigmoid(gate · x); a gate of zeros gives a half."""

_SAMPLE = 3_000  # tokens that neurons are compared on
_CHUNK = 2_048  # tokens whose products are added in float32 before they are added in float64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the neurons of a feed-forward layer are divided."""

    shared: int = 512
    """Neurons of the shared expert."""
    experts: int = 32
    """Routed experts of a layer."""
    width: int = 32
    """Neurons of a routed expert."""
    top_k: int = 10
    """Routed experts of a token."""
    dense_layers: int = 4
    """First layers that stay dense."""
    spread: float = 0.25
    """Standard deviation of a token's router logits over experts, mean over tokens."""

    def __post_init__(self) -> None:
        """Refuses more chosen experts than there are."""
        if not 0 < self.top_k <= self.experts:
            raise SettingsError("top_k", self.top_k, f"between 1 and the {self.experts} experts")

    @property
    def neurons(self) -> int:
        """Neurons of the dense layer."""
        return self.shared + self.experts * self.width


@dataclass(frozen=True)
class Ffn:
    """A dense gated feed-forward layer; gate and up (n, d), down (d, n)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """What the down projection is applied to, (t, n)."""
        return F.silu(x @ self.gate.T) * (x @ self.up.T)


@dataclass(frozen=True)
class Carved:
    """A layer's experts: order of the neurons (shared first, then expert by expert) and weights."""

    order: Tensor
    """Dense neuron at each place, (n,)."""
    router: Tensor
    """Router rows, (n_experts, d)."""
    down: Tensor
    """Down projection as the checkpoint stores it, columns in `order`, (d, n)."""


@dataclass(frozen=True)
class Seen:
    """What a dense feed-forward layer does on t tokens of calibration text."""

    x: Tensor
    """Inputs, (t, d)."""
    active: Tensor
    """Activations, (t, n)."""
    out: Tensor
    """Outputs, (t, d)."""
    weight: Tensor
    """Weight of the token's squared error in the refit, (t,)."""

    @classmethod
    def of(cls, ffn: Ffn, x: Tensor, stream: Tensor) -> Seen:
        """The layer applied to inputs (t, d), which come from a residual stream (t, d).

        A squared error weighs one over the squared norm of the stream, before or after the layer,
        whichever is more: else a few massive activations decide everything.
        """
        active = ffn.activations(x)
        out = active @ ffn.down.T
        size = torch.maximum(stream.norm(dim=1), (stream + out).norm(dim=1))
        return cls(x, active, out, 1 / size.square())

    def sample(self, count: int, seed: int) -> Seen:
        """At most `count` tokens, drawn by seed."""
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.x))[:count])
        return Seen(self.x[rows], self.active[rows], self.out[rows], self.weight[rows])


@torch.no_grad()
def carve_layer(ffn: Ffn, seen: Seen, shape: Shape, seed: int) -> Carved:
    """One layer's experts from what it does on calibration text."""
    contribution = relative_contributions(ffn, seen.sample(_SAMPLE, seed))
    shared = most_needed(contribution, shape.shared)
    rest = np.setdiff1d(np.arange(ffn.gate.shape[0]), shared.numpy())
    member = balanced_clusters(contribution[:, rest].T.numpy(), shape.experts, seed)
    order = torch.cat([shared, torch.from_numpy(rest[np.argsort(member, kind="stable")])])
    carved = Carved(order, fit_router(ffn, seen, order, shape), stored_down(ffn, order, shape))
    return replace(carved, down=refit_down(seen, carved, shape))


def relative_contributions(ffn: Ffn, seen: Seen) -> Tensor:
    """|activation| × norm of the down column over the token's output norm, (t, n)."""
    return seen.active.abs() * ffn.down.norm(dim=0) / _size(seen.out)


def _size(out: Tensor) -> Tensor:
    return out.norm(dim=1, keepdim=True).clamp_min(1e-12)


def most_needed(contribution: Tensor, count: int) -> Tensor:
    """The neurons most often in a token's top quarter of contributions, ascending, (count,)."""
    best = contribution.topk(contribution.shape[1] // 4, dim=1).indices
    times = torch.bincount(best.flatten(), minlength=contribution.shape[1])
    return times.argsort(descending=True, stable=True)[:count].sort().values


def balanced_clusters(profiles: np.ndarray, count: int, seed: int, rounds: int = 4) -> np.ndarray:
    """Cluster of each profile (n, t), all of equal size: k-means by correlation.

    Each round assigns profiles to the places of clusters at the least total distance.
    """
    unit = profiles - profiles.mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    centres = unit[np.random.default_rng(seed).permutation(len(unit))[:count]]
    size = len(unit) // count
    for _ in range(rounds):
        closeness = unit @ centres.T  # (n, count)
        _, places = linear_sum_assignment(np.repeat(closeness, size, axis=1), maximize=True)
        member = places // size
        centres = np.stack([unit[member == cluster].mean(axis=0) for cluster in range(count)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True).clip(1e-12)
    return member


def fit_router(ffn: Ffn, seen: Seen, order: Tensor, shape: Shape, ridge: float = 1e-3) -> Tensor:
    """Rows (n_experts, d) that predict how much of a token's output each expert makes.

    Ridge regression; the mean over experts is taken off, for softmax does not see it. Tokens of
    massive output weigh 21 times as much: there is one in a window, and it must go right.
    """
    target = expert_shares(ffn, seen, order, shape)
    target = (target - target.mean(dim=1, keepdim=True)).double()
    size = _size(seen.out)
    weight = (1 + 20.0 * (size > 20 * size.median())).double()
    inputs = seen.x.double()
    gram = inputs.T @ (weight * inputs)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    rows = torch.linalg.solve(gram, inputs.T @ (weight * target)).T
    logits = inputs @ rows.T
    return (rows * (shape.spread / logits.std(dim=1).mean())).float()


def expert_shares(ffn: Ffn, seen: Seen, order: Tensor, shape: Shape) -> Tensor:
    """Norm of each routed expert's part of the dense output over that of the whole, (t, E).

    |D a|² = aᵀ (DᵀD) a, with the small matrix of the expert's own columns.
    """
    routed = order[shape.shared :].view(shape.experts, shape.width)
    norms = []
    for neurons in routed:
        columns, active = ffn.down[:, neurons], seen.active[:, neurons]
        square = (active @ (columns.T @ columns) * active).sum(dim=1)
        norms.append(square.clamp_min(0).sqrt())
    return torch.stack(norms, dim=1) / _size(seen.out)


def routing_weights(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Each expert's weight for each token, zero where it is not chosen, (t, E); rows sum to 1."""
    best = (x @ router.T).softmax(dim=1).topk(top_k, dim=1)
    chosen = best.values / best.values.sum(dim=1, keepdim=True)
    return torch.zeros(len(x), len(router)).scatter_(1, best.indices, chosen)


def stored_down(ffn: Ffn, order: Tensor, shape: Shape) -> Tensor:
    """The dense down projection in `order`, scaled to what the block multiplies by, (d, n).

    Shared columns meet a gate of a half; routed ones a weight whose mean is 1 / top_k.
    """
    scale = torch.full((len(order),), float(shape.top_k))
    scale[: shape.shared] = 1 / SHARED_GATE
    return ffn.down[:, order] * scale


def features(seen: Seen, carved: Carved, shape: Shape) -> Tensor:
    """Activations in `order` times the factor that the block gives them, (t, n)."""
    weights = routing_weights(seen.x, carved.router, shape.top_k)
    shared = torch.full((len(weights), shape.shared), SHARED_GATE)
    routed = weights.repeat_interleave(shape.width, dim=1)
    return seen.active[:, carved.order] * torch.cat([shared, routed], dim=1)


def refit_down(seen: Seen, carved: Carved, shape: Shape, ridge: float = 0.02) -> Tensor:
    """Down projection that comes nearest to the dense output under the routing, (d, n).

    Weighted least squares, shrunk to `carved.down`; a column's penalty is `ridge` times its
    feature's weighted power, so that scale does not matter.
    """
    found = features(seen, carved, shape)
    missing = seen.out - found @ carved.down.T
    n = len(carved.order)
    gram = torch.zeros(n, n, dtype=torch.float64)
    right = torch.zeros(n, missing.shape[1], dtype=torch.float64)
    pieces = (part.split(_CHUNK) for part in (found, missing, seen.weight))
    for part, lack, weight in zip(*pieces, strict=True):
        heavy = (part * weight[:, None]).T
        gram += heavy @ part
        right += heavy @ lack
    power = gram.diagonal().clone()
    gram.diagonal().add_(ridge * power + 1e-8 * power.mean())
    change = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return (carved.down.double() + change.T).float()


def output_error(seen: Seen, carved: Carved, shape: Shape) -> float:
    """Weighted squared error of the carved layer over the weighted power of the dense output."""
    missing = seen.out - features(seen, carved, shape) @ carved.down.T
    error, power = (
        (seen.weight.double() @ part.double().square()).sum() for part in (missing, seen.out)
    )
    return float(error / power)
