"""One layer of a model at a time, through its forward; models that do not allow it are found."""

import pytest
import torch
from torch import nn

from moecollab.errors import UnsupportedModelError
from moecollab.models.replay import Replay


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.tensor(float(number + 2)))

    def forward(self, hidden, extra=None, shared=None, **_):
        if shared is not None:
            shared[self.number] = hidden
        if extra is not None:
            hidden = hidden + extra
        return hidden * self.weight + 1


class Model(nn.Module):
    """A chain of layers; `forward` is what a test makes of it."""

    def __init__(self, forward, n_layers=4):
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(n_layers))
        self.how = forward

    def forward(self, hidden):
        return self.how(self.layers, hidden)


def plain(layers, hidden):
    for number, layer in enumerate(layers):
        hidden = layer(hidden + number)  # something between the layers
    return hidden


def through(model, hidden):
    """The output of the last layer, one layer at a time."""
    replay = Replay(model.layers, "ToyModel")
    given = None
    for number in range(len(model.layers)):
        given = replay.run(number, given, lambda: model(hidden))
    return given


def test_chain_is_the_same():
    model = Model(plain)
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(through(model, hidden), model(hidden), rtol=0, atol=0)
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_overflow_is_not_taken_for_a_shortcut():
    assert through(Model(plain), torch.full((2, 3), torch.nan)).isnan().all()


def tuples(layers, hidden):
    state = (hidden, None)
    for layer in layers:
        state = (layer(state[0]), torch.arange(3))
    return state[0]


def test_tuples_are_the_same():
    model, hidden = Model(tuples), torch.randn(2, 3)
    torch.testing.assert_close(through(model, hidden), model(hidden), rtol=0, atol=0)


def skipping(layers, hidden):
    outputs = []
    for layer in layers:
        hidden = layer(hidden, outputs[-2] if len(outputs) > 1 else None)
        outputs.append(hidden)
    return hidden


def sharing(layers, hidden):
    shared = {}
    for layer in layers:
        hidden = layer(hidden, shared=shared)
    return hidden


def looping(layers, hidden):
    for layer in [*layers, *layers]:
        hidden = layer(hidden)
    return hidden


def backwards(layers, hidden):
    for layer in reversed(layers):
        hidden = layer(hidden)
    return hidden


def short(layers, hidden):
    for layer in layers[:-1]:
        hidden = layer(hidden)
    return hidden


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (skipping, "hands on more between layers than hidden states"),
        (sharing, "lets layers share what they keep"),
        (looping, "does not call its layers once each in order"),
        (backwards, "does not call its layers once each in order"),
        (short, "does not call its layers once each in order"),
    ],
)
def test_models_that_are_no_chain(forward, why):
    model = Model(forward)
    with pytest.raises(UnsupportedModelError, match=f"ToyModel {why}; record it without"):
        through(model, torch.randn(2, 3))
    assert all("forward" not in vars(layer) for layer in model.layers)
