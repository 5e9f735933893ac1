"""What criteria that run a model owe it: to leave it as it was, whatever happens."""

import numpy as np
import pytest
import torch
from probed import NAMES, SUBJECTS, WINDOWS

from moecollab.criteria.scoring import score
from moecollab.errors import DataError, MissingInputError
from moecollab.models.routing import find_moe_layers


def state(model):
    """All that running a model could change."""
    modules = list(model.modules())
    hooks = [
        len(vars(module)[kind])
        for module in modules
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": [id(value) for value in model.state_dict(keep_vars=True).values()],
        "flags": [one.requires_grad for one in model.parameters()],
        "grads": [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        "modes": [module.training for module in modules],
        "own": [sorted(vars(module)) for module in modules],
        "hooks": hooks,
    }


def assert_same(model, before):
    after = state(model)
    for key, value in before.pop("values").items():
        assert torch.equal(after["values"][key], value), key
    after.pop("values")
    for one, other in zip(before.pop("grads"), after.pop("grads"), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert after == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["shared", "groups"])
def test_the_model_is_left_as_it_was(name, kind):
    model = SUBJECTS[kind]().train()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    model.model.layers[1].eval()
    before = state(model)
    with torch.no_grad():
        score(name, model=model, corpus=WINDOWS)
    assert torch.is_grad_enabled()
    assert_same(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_one_clear_error_and_leaves_the_model_as_it_was(name):
    model = SUBJECTS["shared"]()
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[:, 0, 0] = 3e38
    before = state(model)
    message = r"(the loss on window 0 of the text|what model.layers.1.mlp returns|what the experts "
    message += r"of model.layers.1.mlp return) is not finite; look for NaN"
    with pytest.raises(DataError, match=message):
        score(name, model=model, corpus=WINDOWS)
    assert_same(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_needed(name):
    with pytest.raises(MissingInputError, match="pass model= and corpus="):
        score(name, model=SUBJECTS["mixtral"](), corpus=[np.array([], np.int64)])
