"""Folders before and after a pruning file by file, by the reference library."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from moecollab.models import loading
from moecollab.models.keep import Keep
from moecollab.models.routing import find_moe_layers

EVEN = (0, 2, 4, 6)


def keep_even(folder_or_model, kept=EVEN, n_experts=8):
    model = folder_or_model
    if not isinstance(model, torch.nn.Module):
        model = loading.skeleton(loading.open_config(str(model), moe=True))
    layers = find_moe_layers(model)
    return Keep({layer.layer: kept for layer in layers}, n_experts, layers[0].top_k)


def tensors(folder):
    """All tensors of a folder, by the reference library; each file must be as its index says."""
    index = folder / "model.safetensors.index.json"
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(found)
        found |= part
        if index.exists():
            places = json.loads(index.read_text())["weight_map"]
            assert set(part) == {name for name, place in places.items() if place == file.name}
    if index.exists():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(value.nbytes for value in found.values())
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.shape == other[name].shape
        raw, expected = (
            held.contiguous().view(-1).view(torch.uint8) for held in (value, other[name])
        )
        assert torch.equal(raw, expected), name


def save_changed(base, change):
    """Writes a folder's tensors again after a change to them."""
    held = load_file(base / "model.safetensors")
    change(held)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    return held
