"""Checkpoints made from checkpoints that were cut, padded, merged or repaired before."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import models
import zoo
from moecollab.errors import PlanError
from moecollab.evaluation.repairing.repairing import repair
from moecollab.models.keep import Keep
from moecollab.models.loading import load_model
from moecollab.models.masked import kept_of, original_of
from moecollab.models.routing import find_moe_layers
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


@pytest.mark.parametrize("start", ["base", "first"])
def test_ids_are_known_after_cuts_in_memory(start, base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    model = load_model(tmp_path / start)[0]
    if start == "base":
        prune(model, FIRST)
    prune(model, SECOND)
    prune(model, Keep({1: (0, 2), 2: (0, 2)}, 3, 2), out=tmp_path / "third")
    note, whole = note_of(tmp_path / "third"), load_file(base / "model.safetensors")
    assert note["experts"]["keep"] == {"1": [0, 2], "2": [0, 2]}
    assert note["original"]["keep"] == {"1": [0, 7], "2": [3, 6]}
    assert note["original"]["n_experts"] == 8
    small = load_file(tmp_path / "third" / "model.safetensors")
    for layer, kept in note["original"]["keep"].items():
        for place, expert in enumerate(kept):
            name = f"model.layers.{layer}.mlp.experts.{{}}.up_proj.weight"
            assert (small[name.format(place)] == whole[name.format(expert)]).all()
    assert original_of(base, FIRST) is None


def test_ids_are_not_guessed_after_changes_unseen(base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    assert original_of(tmp_path / "first", FIRST) is None
    assert original_of(tmp_path / "first", FIRST, SECOND) is None


def test_repair_of_what_was_cut_in_memory_names_what_is_there(base, tmp_path):
    prune(base, FIRST, out=tmp_path / "first")
    model = load_model(tmp_path / "first")[0]
    prune(model, SECOND)
    text = [f"document {number} " * 4 for number in range(12)]
    repair(model, text, teacher=base, steps=1, batch_size=4, out=tmp_path / "repaired")
    note = note_of(tmp_path / "repaired")
    assert note["experts"]["keep"] == SECOND.as_json()["keep"]
    assert note["original"] == UNION.as_json()
    model = load_model(base)[0]
    prune(model, FIRST)
    repair(model, text, plan=SECOND, steps=1, batch_size=4, out=tmp_path / "both")
    assert note_of(tmp_path / "both")["original"] == UNION.as_json()


def test_padding_is_known_after_repair(base, tmp_path):
    prune(base, Keep({1: (0, 2, 5, 7), 2: (1, 6)}, 8, 2), uneven="pad", out=tmp_path / "pad")
    text = [f"document {number} " * 4 for number in range(12)]
    repair(tmp_path / "pad", text, teacher=base, steps=1, batch_size=4, out=tmp_path / "repaired")
    body = (tmp_path / "repaired" / "README.md").read_text()
    places = note_of(tmp_path / "pad")["padding"]
    assert note_of(tmp_path / "repaired")["padding"] == places
    assert "| 2 | 4 | 2 | 2 |" in body
    assert "layers are padded with experts that cannot be chosen" in body
    assert "nan" not in body
    assert "too few documents for an interval" in body


def test_padding_is_known_after_mone(tmp_path):
    zoo.build("gpt_oss").save_pretrained(tmp_path / "base")
    layers = find_moe_layers(zoo.build("gpt_oss"))
    keep = {one.layer: tuple(range(4 - one.layer % 2)) for one in layers}
    prune(tmp_path / "base", Keep(keep, 8, 2), uneven="pad", out=tmp_path / "pad")
    some = Keep(dict.fromkeys(keep, (0, 1)), 4, 2)
    merge(tmp_path / "pad", some, how="mone", corpus=[np.arange(3, 60)], out=tmp_path / "mone")
    assert note_of(tmp_path / "mone")["padding"] == note_of(tmp_path / "pad")["padding"] != {}
    everyone = Keep(dict.fromkeys(keep, (0, 1, 3)), 4, 2)
    with pytest.raises(PlanError, match=r"keep experts \[3\], which are padding"):
        prune(tmp_path / "mone", everyone, out=tmp_path / "bad")


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
