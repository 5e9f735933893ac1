"""Weights that tell what they are multiplied with: expert outputs, where the model computes them.

Every implementation of experts ends in one product, outputs times routing weights. A tensor
subclass in place of the weights sees it: which outputs, and by the path that the weights took, for
which tokens and slots. Nothing is computed twice and the model's own arithmetic stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tell: TypeAlias = Callable[[Tensor, Tensor], None]
"""Told of outputs (n, hidden) and their places (n,), position · top_k + slot of each."""

_PRODUCTS = frozenset(
    (
        *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
        *(Tensor.mul_, Tensor.multiply_, Tensor.__imul__),
    )
)
_MOVES = frozenset(
    (
        *(torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten, torch.index_select),
        *(torch.gather, torch.take, torch.masked_select, torch.transpose, torch.permute),
        *(Tensor.reshape, Tensor.view, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten),
        *(Tensor.__getitem__, Tensor.index_select, Tensor.gather, Tensor.take),
        *(Tensor.masked_select, Tensor.t, Tensor.transpose, Tensor.permute, Tensor.expand),
        *(Tensor.contiguous, Tensor.clone, torch.t),
    )
)
_CASTS = frozenset((Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.type_as))


class TappedWeights(Tensor):
    """Routing weights that know their places and whom to tell."""

    _places: Tensor
    _tell: Tell

    @classmethod
    def of(cls, weights: Tensor, tell: Tell) -> TappedWeights:
        """The same weights, listening.

        Parameters
        ----------
        weights : Tensor of shape (n_positions, top_k)
            Routing weights.
        tell : Tell
            Called before each product with outputs.
        """
        places = torch.arange(weights.numel(), device=weights.device).reshape(weights.shape)
        return cls._with(weights, places, tell)

    @classmethod
    def _with(cls, weights: Tensor, places: Tensor, tell: Tell) -> TappedWeights:
        tapped = weights.as_subclass(cls)
        tapped._places, tapped._tell = places, tell
        return tapped

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401 (any function of torch)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Runs a function on plain weights; products are told, moves and casts are followed."""
        kwargs = kwargs or {}
        first = next((value for value in args if isinstance(value, cls)), None)
        with torch._C.DisableTorchFunctionSubclass():
            plain = [_plain(value, cls) for value in args]
            if first is None:
                return func(*plain, **{name: _plain(v, cls) for name, v in kwargs.items()})
            if func in _PRODUCTS:
                _told(first, plain, args)
            result = func(*plain, **kwargs)
            if not isinstance(result, Tensor) or args[0] is not first:
                return result
            if func in _MOVES:
                return cls._with(result, func(first._places, *plain[1:], **kwargs), first._tell)
            if func in _CASTS:  # to another device as well
                return cls._with(result, first._places.to(result.device), first._tell)
            return result


def _plain(value: Any, kind: type[Tensor]) -> Any:  # noqa: ANN401
    return value.as_subclass(Tensor) if isinstance(value, kind) else value


def _told(weights: TappedWeights, plain: list[Any], args: tuple[Any, ...]) -> None:
    """Tells of a product of outputs (n, hidden) and weights (n, 1) of n places."""
    outputs = plain[1] if args[0] is weights else plain[0]
    places = weights._places
    fits = isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.is_floating_point()
    if fits and places.shape == (len(outputs), 1):
        weights._tell(outputs, places[:, 0])
