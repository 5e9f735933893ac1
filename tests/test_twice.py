"""Checkpoints made from checkpoints that were cut, padded, merged or repaired before."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import models
from moecollab.models.keep import Keep
from moecollab.models.loading import load_model
from moecollab.models.masked import kept_of, original_of
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.pruning import prune

FIRST = Keep({1: (0, 2, 5, 7), 2: (1, 3, 4, 6)}, 8, 2)
SECOND = Keep({1: (0, 1, 3), 2: (1, 2, 3)}, 4, 2)
UNION = Keep({1: (0, 2, 7), 2: (3, 4, 6)}, 8, 2)
"""The second by the ids of the first model."""


@pytest.fixture
def base(tmp_path):
    return models.save("deepseek_v3", tmp_path / "base")


def note_of(folder):
    return json.loads((folder / "moecollab.json").read_text())


def opened(folder, given):
    return folder if given == "folder" else load_model(folder)[0]


@pytest.mark.parametrize("given", ["folder", "loaded"])
def test_ids_of_the_first_model_are_kept(given, base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    assert "original" not in note_of(tmp_path / "first")
    prune(opened(tmp_path / "first", given), SECOND, out=tmp_path / "second")
    prune(base, UNION, out=tmp_path / "once")
    note = note_of(tmp_path / "second")
    assert note["experts"] == SECOND.as_json()
    assert note["original"] == note_of(tmp_path / "once")["experts"] == UNION.as_json()
    once, twice = (load_file(tmp_path / one / "model.safetensors") for one in ("once", "second"))
    assert all((twice[name] == value).all() for name, value in once.items())
    assert once.keys() == twice.keys()
    third = Keep({1: (0, 2), 2: (0, 2)}, 3, 2)
    prune(opened(tmp_path / "second", given), third, out=tmp_path / "third")
    assert note_of(tmp_path / "third")["original"]["keep"] == {"1": [0, 7], "2": [3, 6]}
    assert kept_of(tmp_path / "second") == SECOND


@pytest.mark.parametrize("uneven", ["native", "pad"])
def test_ids_through_layers_of_different_numbers(uneven, base, tmp_path):
    keep = Keep({1: (0, 2, 5, 7), 2: (1, 6)}, 8, 2)
    prune(base, keep, uneven=uneven, out=tmp_path / "first")
    held = {"native": ((0, 1, 3), (0, 1)), "pad": ((0, 1, 3), (1, 3))}[uneven]
    counts = {"native": (4, 2), "pad": None}[uneven]
    second = Keep(dict(zip((1, 2), held, strict=True)), 4, 2, experts_per_layer=counts)
    prune(tmp_path / "first", second, uneven="native", out=tmp_path / "second")
    note = note_of(tmp_path / "second")
    assert note["original"] == Keep({1: (0, 2, 7), 2: (1, 6)}, 8, 2).as_json()
    whole, small = (load_file(tmp_path / one / "model.safetensors") for one in ("base", "second"))
    for layer, kept in ((1, (0, 2, 7)), (2, (1, 6))):
        for place, expert in enumerate(kept):
            name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
            assert (small[name.format(layer, place)] == whole[name.format(layer, expert)]).all()


def test_ids_are_not_guessed_after_cuts_in_memory(base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    model = load_model(tmp_path / "first")[0]
    prune(model, SECOND)
    prune(model, Keep({1: (0, 1), 2: (0, 1)}, 3, 2), out=tmp_path / "third")
    assert "original" not in note_of(tmp_path / "third")
    assert original_of(base, FIRST) is None


def test_merging_what_was_pruned(base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    groups = {1: [[0, 1], [2], [3]], 2: [[1], [3, 0], [2]]}
    merge(tmp_path / "first", groups, how="dek", corpus=[np.arange(3, 30)], out=tmp_path / "merged")
    note = note_of(tmp_path / "merged")
    assert note["loads"].startswith("loads in transformers")
    placed = {
        layer: sorted(one[0] for one in found) for layer, found in note["merged"]["groups"].items()
    }
    assert {layer: list(ids) for layer, ids in note["experts"]["keep"].items()} == placed
    expected = {
        layer: [FIRST.keep[int(layer)][one] for one in ids] for layer, ids in placed.items()
    }
    assert note["original"]["keep"] == expected
    assert note["original"]["n_experts"] == 8
