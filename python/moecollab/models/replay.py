"""Running one decoder layer of a model through the model's own forward.

For each layer the model's forward is run again, with every other decoder layer standing aside: the
one before hands on what it gave when it ran, the ones before that hand on NaN, and after the layer
the forward is left. So masks, positions and everything else between the layers are the model's own.
A model whose layers take more than what the layer before gave is found by the NaN that reaches a
layer, or by the change that a layer makes in what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from moecollab.errors import UnsupportedModelError

Given: TypeAlias = Any  # what a layer returns: a tensor, or a tuple with tensors


class _Left(BaseException):
    """Ends a forward after the layer that was wanted."""


class Replay:
    """Decoder layers of which one runs at a time.

    Parameters
    ----------
    layers : ModuleList
        The decoder layers, in the order in which the model calls them.
    name : str
        The model, for messages.
    """

    def __init__(self, layers: nn.ModuleList, name: str) -> None:
        self.layers = layers
        self.name = name
        self._checked: set[int] = set()

    def run(self, number: int, before: Given, forward: Callable[[], object]) -> Given:
        """What one layer gives.

        Parameters
        ----------
        number : int
            The layer, which must have its weights.
        before : tensor or tuple
            What the layer before gave for the same tokens; None for the first layer.
        forward : callable
            Runs the model.

        Raises
        ------
        UnsupportedModelError
            When layers are not called once each in order, or take more than what the layer before
            gave.
        """
        call = _Call(self, number, before, check=number not in self._checked)
        with ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                stack.enter_context(instead(layer, call.stand_in(place, layer.forward)))
            with suppress(_Left):
                forward()
        if call.next < len(self.layers) and not call.left:
            raise self.unsupported("does not call its layers once each in order")
        self._checked.add(number)
        return call.given

    def unsupported(self, why: str) -> UnsupportedModelError:
        """The refusal of a model whose layers are not independent."""
        return UnsupportedModelError(f"{self.name} {why}; record it without layer_by_layer")


class _Call:
    """One forward of which one layer runs."""

    def __init__(self, replay: Replay, number: int, before: Given, *, check: bool) -> None:
        self.replay = replay
        self.number = number
        self.before = before
        self.check = check
        self.next = 0
        self.left = False
        self.given: Given = None

    def stand_in(self, place: int, real: Callable[..., Given]) -> Callable[..., Given]:
        """What is called in place of a layer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Given:  # noqa: ANN401
            if place != self.next:
                raise self.replay.unsupported("does not call its layers once each in order")
            self.next += 1
            if place < self.number:
                return self.before if place == self.number - 1 else _poison(self.before)
            if place == self.number:
                self.given = self._run(real, args, kwargs)
            if not self.check or self.number:
                self.left = True
                raise _Left
            # The first layer's first call goes on, to see the order of all layers.
            return _poison(self.given)

        return forward

    def _run(self, real: Callable[..., Given], args: Any, kwargs: Any) -> Given:  # noqa: ANN401
        if not self.check:
            return real(*args, **kwargs)
        # What overflowed by itself is told elsewhere, with the layer.
        sound = not any(_poisoned(leaf) for leaf in tree_leaves(self.before))
        if (
            self.number > 1
            and sound
            and any(_poisoned(leaf) for leaf in tree_leaves((args, kwargs)))
        ):
            raise self.replay.unsupported("hands on more between layers than hidden states")
        holders = [value for value in (*args, *kwargs.values()) if _holds(value)]
        contents = [_contents(value) for value in holders]
        given = real(*args, **kwargs)
        if contents != [_contents(value) for value in holders]:
            raise self.replay.unsupported("lets layers share what they keep")
        return given


@contextmanager
def instead(layer: nn.Module, forward: Callable[..., Given]) -> Iterator[None]:
    """Another forward for a layer while the block runs."""
    own = layer.__dict__.get("forward")
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = own


def _poison(given: Given) -> Given:
    """The shape of what a layer gave, with values that nothing may use; takes no memory."""

    def one(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        bad = float("nan") if _can_be_nan(value) else _lowest(value.dtype)
        return torch.full((), bad, dtype=value.dtype, device=value.device).expand(value.shape)

    return tree_map(one, given)


def _can_be_nan(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _lowest(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else int(torch.iinfo(dtype).min)


def _poisoned(value: object) -> bool:
    """Whether a tensor holds what :func:`_poison` puts into tensors."""
    if not isinstance(value, Tensor) or value.dtype in (torch.bool, torch.uint8):
        return False
    bad = value.isnan() if _can_be_nan(value) else value == _lowest(value.dtype)
    return bool(bad.any())


def _holds(value: object) -> bool:
    """Whether a layer could leave something in an argument."""
    return isinstance(value, Mapping | list | set) or hasattr(value, "__dict__")


def _contents(value: Any) -> object:  # noqa: ANN401 (whatever a model hands to its layers)
    """Identities of what an argument holds."""
    if isinstance(value, Mapping):
        return {key: id(one) for key, one in value.items()}
    if isinstance(value, list | set):
        return sorted(id(one) for one in value)
    return {key: id(one) for key, one in vars(value).items()}
