"""Router probabilities before top-k, for every expert of a layer.

What a router makes of its logits (softmax, sigmoid, …) differs by family and even by setting, but
shows in the weights: those of two experts of a token stand in the ratio of their scores, however
they were normalised and scaled after. So the score is found by comparing ratios, once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer

_CLOSE = 0.02


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _sqrt_softplus(logits: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logits).sqrt()


def _as_they_are(values: Tensor) -> Tensor:
    return values


SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
    "probabilities": _as_they_are,
}
"""What routers make of what they return, tried in this order."""


class Probability:
    """Reads the probabilities of one layer's experts from what its router returns.

    Parameters
    ----------
    layer : MoeLayer
        The layer.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self.layer = layer
        self.returned: list[Tensor] = []
        self.chosen: tuple[int, str] | None = None

    def attach(self) -> Sequence[RemovableHandle]:
        """A hook after the router."""
        return [self.layer.router.register_forward_hook(self._routed)]

    def of(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Probabilities of the call that chose these experts with these weights.

        Softmax scores are as they are; others are divided by their sum over the routed experts.

        Parameters
        ----------
        ids, weights : Tensor of shape (n_positions, top_k)
            What was chosen, and with which coefficients.

        Returns
        -------
        float32 Tensor of shape (n_positions, n_experts)

        Raises
        ------
        UnsupportedModelError
            When nothing that the router returns explains the weights.
        """
        return self.read(ids, weights)[0]

    def read(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the logits: of a router that returns none, logarithms of its scores."""
        found, self.returned = [self._flat(value) for value in self.returned], []
        fitting = [value for value in found if len(value) == len(ids)]
        if self.chosen is None:
            self.chosen = self._choose(fitting, ids, weights)
        number, name = self.chosen
        value = fitting[number]
        score = SCORES[name](value)[:, : self.layer.n_experts]
        logits = value.clamp_min(1e-30).log() if name == "probabilities" else value
        share = score if name == "softmax" else score / score.sum(dim=-1, keepdim=True)
        return share, logits[:, : self.layer.n_experts]

    def _routed(self, _router: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        values = output if isinstance(output, tuple | list) else [output]
        floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim()]
        self.returned = [v.detach() for v in floats if v.shape[-1] >= self.layer.n_experts]

    def _flat(self, value: Tensor) -> Tensor:
        return value.float().reshape(-1, value.shape[-1])

    def _choose(self, values: list[Tensor], ids: Tensor, weights: Tensor) -> tuple[int, str]:
        """Which of the returned values, under which score, explains the weights best."""
        if self.layer.layout.scoring and values:
            return 0, self.layer.layout.scoring
        errors = {
            (number, name): self._error(score(value), ids, weights)
            for name, score in SCORES.items()
            for number, value in enumerate(values)
        }
        best = min(errors, key=lambda key: errors[key], default=None)
        if best is None or not errors[best] < _CLOSE:
            raise UnsupportedModelError(
                f"the router of {self.layer.name} ({type(self.layer.router).__name__}) does not "
                "return what its weights are made of (a masked model's never does); record without "
                "probability, or register the layout again with scoring="
            )
        # Of scores that explain the weights alike the first counts: the last are probabilities.
        return next(key for key, error in errors.items() if error <= errors[best] + _CLOSE / 20)

    def _error(self, score: Tensor, ids: Tensor, weights: Tensor) -> float:
        """Median deviation of the logarithm of ratios of weights; of weights under top 1."""
        used = (ids < self.layer.n_experts) & (weights != 0)
        picked = score.gather(1, ids.long().clamp(max=score.shape[-1] - 1))
        deviation = picked.clamp_min(1e-30).log() - weights.abs().clamp_min(1e-30).log()
        if ids.shape[1] > 1:
            deviation, used = deviation[:, 1:] - deviation[:, :1], used[:, 1:] & used[:, :1]
        return float(deviation[used].abs().median()) if bool(used.any()) else float("inf")
