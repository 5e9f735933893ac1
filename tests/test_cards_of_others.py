"""The READMEs of merged, repaired and masked models."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from moecollab.evaluation.repairing.repairing import repair
from moecollab.manifest import read_json
from moecollab.models.masking import mask
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.pruning import prune
from test_card import base, plan_of, read, rows, size_of
from test_repairing import corpus

__all__ = ["base"]
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = [np.arange(3, 40)]


def test_card_of_a_merged_model(base, tmp_path):
    merge(base, plan_of(), how="hc_smoe", corpus=TOKENS, out=tmp_path / "small")
    front, body = read(tmp_path / "small")
    assert front[0] == "license: other"
    assert front[-2:] == [
        'base_model: "Some-MoE"',
        "tags: [mixture-of-experts, merged, moecollab]",
    ]
    assert body.startswith("\n# Some-MoE with 4 of 8 experts a layer\n")
    assert "Made from `Some-MoE` by merging routed experts, without any training" in body
    assert "- **Method**: hc_smoe; router row dominant, neurons as they were.\n" in body
    groups = [
        one
        for layer in read_json(tmp_path / "small" / "moecollab.json")["merged"]["groups"].values()
        for one in layer
    ]
    several = [len(one) for one in groups if len(one) > 1]
    told = f"- **Groups**: 8, of which {len(several)} hold several experts, the largest"
    assert f"{told} {max(several)}. Members" in body
    assert "- **Criterion**: reap.\n- **Budget**: drop 0.5, per layer.\n" in body
    (old, _), (new, new_bytes) = size_of(base), size_of(tmp_path / "small")
    assert rows(body, "| | before")[4:] == [
        ["numbers stored", f"{old:,}", f"{new:,}"],
        ["bytes of weights", f"{size_of(base)[1]:,}", f"{new_bytes:,}"],
    ]
    loads = read_json(tmp_path / "small" / "moecollab.json")["loads"]
    assert f"This checkpoint {loads}." in body
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / "BASE_README.md").exists()
    assert (tmp_path / "small" / "LICENSE.txt").exists()


def test_card_of_groups_of_ones_own(base, tmp_path):
    groups = {layer: [[0], [1, 2, 3], [4], [5, 6, 7]] for layer in (1, 2)}
    merge(base, groups, how="ream", corpus=TOKENS, out=tmp_path / "small")
    _, body = read(tmp_path / "small")
    assert "ream; router row dominant, neurons aligned by activity." in body
    assert "- **Groups**: 8, of which 4 hold several experts, the largest 3." in body
    assert "**Criterion**" not in body


def test_card_of_a_repaired_model(base, tmp_path):
    plan = plan_of()
    found = repair(base, corpus(), plan=plan, steps=2, batch_size=4, out=tmp_path / "small")
    _, body = read(tmp_path / "small")
    assert body.startswith("\n# Some-MoE with 4 of 8 experts a layer\n")
    assert "by removing routed experts and training its routers and norms" in body
    assert "## What was dropped and trained\n\n- **Repair**: KL from the whole model" in body
    low, high = found.interval
    assert f"{found.before:.4f} nats a token before and {found.after:.4f} after" in body
    assert f"gain {found.gain:.4f}, 95 % interval [{low:.4f}, {high:.4f}]" in body
    assert "- **Criterion**: reap." in body
    note = read_json(tmp_path / "small" / "moecollab.json")
    assert note["loads"].startswith("loads in transformers")


def test_card_of_a_model_repaired_by_its_teacher(base, tmp_path):
    prune(base, plan_of(), out=tmp_path / "small")
    settings = {"teacher": base, "steps": 1, "batch_size": 4}
    repair(tmp_path / "small", corpus(), out=tmp_path / "repaired", **settings)
    _, body = read(tmp_path / "repaired")
    assert body.startswith("\n# small with routers and norms repaired\n")
    assert "**Criterion**" not in body
    assert rows(body, "| | before")[1] == ["routed experts", "8", "8"]
    first, second = (read_json(tmp_path / one / "moecollab.json") for one in ("small", "repaired"))
    assert second["experts"] == first["experts"]
    assert (tmp_path / "repaired" / "BASE_README.md").read_text().startswith("---")
    assert (tmp_path / "repaired" / "BASE_BASE_README.md").exists()


def test_readme_of_a_masked_model(base, tmp_path):
    mask(base, plan_of(), out=tmp_path / "masked")
    text = (tmp_path / "masked" / "README.md").read_text()
    assert text.startswith("# Some-MoE under a mask\n")
    assert "the 8 of its 16 experts that its routers may choose" in text
    assert "`moecollab extract` and `moecollab evaluate` take this folder" in text
    assert str(tmp_path) not in text, "no path of this machine"
