"""Copies of a model's routers and norms that can be trained and put in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moecollab.models.keep import Keep
from moecollab.models.masked import CHOICE_BIAS, Mask
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import router_rows


@dataclass(frozen=True)
class Place:
    """A parameter's module and its name there."""

    module: nn.Module
    name: str

    @property
    def value(self) -> Tensor:
        """What the module holds now."""
        found: Tensor = vars(self.module)["_parameters"][self.name]
        return found

    def put(self, value: Tensor) -> None:
        """Puts any tensor there, so that gradients reach what it was made of."""
        vars(self.module)["_parameters"][self.name] = value


class Trainable:
    """Trainable copies, in float32, of the parameters of a model's routers and norms.

    Under a plan the model is masked while they are in place, so that one set of weights serves as
    the whole model and as the pruned one.

    Parameters
    ----------
    model : causal language model
        Whole if there is a plan, else pruned already.
    keep : Keep, optional
        The experts that stay.
    """

    def __init__(self, model: Any, keep: Keep | None) -> None:  # noqa: ANN401
        self.model = model
        self.keep = keep
        self.layers = find_moe_layers(model)
        with self._masked():
            self.places = _places(model, self.layers)
            values = [place.value.detach().float().clone() for place in self.places]
        self.copies = [value.requires_grad_() for value in values]

    @contextmanager
    def placed(self) -> Iterator[None]:
        """The model with the copies in place, and masked under a plan; afterwards as before."""
        with self._masked():
            before = [place.value for place in self.places]
            for place, copy, own in zip(self.places, self.copies, before, strict=True):
                place.put(copy.to(own.dtype))
            try:
                yield
            finally:
                for place, own in zip(self.places, before, strict=True):
                    place.put(own)

    def write(self) -> None:
        """Gives the model, which is cut by now, the copies' values for good."""
        for place, copy in zip(self.places, self.copies, strict=True):
            own = place.value
            place.put(nn.Parameter(copy.detach().to(own.dtype), own.requires_grad))

    def state(self) -> list[Tensor]:
        """The values of the copies."""
        return [copy.detach().clone() for copy in self.copies]

    def load(self, state: Sequence[Tensor]) -> None:
        """Gives the copies other values."""
        for copy, value in zip(self.copies, state, strict=True):
            copy.data.copy_(value)

    @contextmanager
    def _masked(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.keep is not None:
                stack.enter_context(Mask(self.model, self.keep))
            yield


def _places(model: nn.Module, layers: Sequence[MoeLayer]) -> list[Place]:
    """Parameters of routers, but for the bias they choose by, and of norms; each once."""
    routers = [part for layer in layers for part in layer.router.modules()]
    owners = [owner for layer in layers for owner, _, _ in router_rows(layer)]
    found = [
        Place(module, name)
        for module in [*routers, *owners]
        for name in module._parameters
        if name in _routing_names(layers, module) or module in routers
    ]
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    found += [Place(module, name) for module in norms for name in module._parameters]
    unique = {(id(one.module), one.name): one for one in found}
    return [one for one in unique.values() if _trains(one)]


def _routing_names(layers: Sequence[MoeLayer], module: nn.Module) -> set[str]:
    return {name for layer in layers for owner, name, _ in router_rows(layer) if owner is module}


def _trains(place: Place) -> bool:
    value = vars(place.module)["_parameters"][place.name]
    return value is not None and value.is_floating_point() and place.name != CHOICE_BIAS
