"""Scales, packed weights, further layers and what cannot be told go where they must."""

import json

import pytest
import torch

import models
import zoo
from moecollab import progress
from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.loading import load_model
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.pruning import prune
from moecollab.pruning.streaming.naming import check_untied, routed_parts
from streamed import EVEN, assert_same, keep_even, save_changed, tensors

pytestmark = pytest.mark.filterwarnings("ignore")


def test_scales_and_packed_weights_go_with_their_experts(tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base")

    def quantised(held):
        for name in [name for name in held if ".experts." in name]:
            stem = name.removesuffix(".weight")
            held[f"{name}_scale_inv"] = torch.rand(1, 1)
            if ".up_proj." in name:  # packed, without a plain weight
                held[f"{stem}.qweight"] = torch.randint(0, 9, (4, 16), dtype=torch.int32)
                held[f"{stem}.g_idx"] = torch.arange(4, dtype=torch.int32)
                del held[name], held[f"{name}_scale_inv"]
            else:
                held[name] = held[name].to(torch.float8_e4m3fn)
        held["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.rand(1, 1)

    held = save_changed(base, quantised)
    found = tensors(prune(base, keep_even(base), out=tmp_path / "small", verify=True))
    assert len(found) == len(held) - 2 * 4 * 6
    for name, value in found.items():
        parts = name.split(".")
        if "experts" in parts:
            parts[5] = str(EVEN[int(parts[5])])
        expected = held[".".join(parts)]
        expected = expected[list(EVEN)] if name.endswith("gate.weight") else expected
        assert value.dtype == expected.dtype
        assert torch.equal(value.float(), expected.float())


@pytest.mark.parametrize("fits", [True, False])
def test_fused_blocks_and_scales_are_cut_where_that_is_exact(fits, tmp_path):
    model = zoo.build("gpt_oss")
    model.save_pretrained(tmp_path / "base")

    def packed(held):
        for name in [name for name in held if name.endswith("experts.down_proj")]:
            held[f"{name}_blocks"] = torch.randint(0, 255, (8, 4, 2, 16), dtype=torch.uint8)
            shape = (8, 4, 2) if fits else (16, 2)
            held[f"{name}_scales"] = torch.randint(0, 255, shape, dtype=torch.uint8)
            del held[name]

    held = save_changed(tmp_path / "base", packed)
    keep = keep_even(model)
    if not fits:
        with pytest.raises(UnsupportedModelError, match=r"not certain what .*down_proj_scales of"):
            prune(tmp_path / "base", keep, out=tmp_path / "small")
        return
    found = tensors(prune(tmp_path / "base", keep, out=tmp_path / "small"))
    for name, value in found.items():
        cut = ".experts." in name or ".router." in name
        assert torch.equal(value, held[name][list(EVEN)] if cut else held[name]), name


def with_further_layer(base):
    """Adds a layer that predicts the token after the next."""

    def added(held):
        for name, value in list(held.items()):
            if name.startswith("model.layers.2."):
                held[name.replace(".2.", ".3.", 1)] = value.clone()
        held["model.layers.3.eh_proj.weight"] = torch.ones(4, 8)

    return save_changed(base, added)


class Said:
    """Takes what is said, and shows nothing."""

    def __init__(self):
        self.lines = []

    def open(self, _what, _total):
        return progress._Silent()

    def close(self, _bar):
        pass

    def say(self, text):
        self.lines.append(text)


def test_further_layers_go_with_the_first_expert(tmp_path, monkeypatch):
    base = models.save("deepseek_v3", tmp_path / "base")
    held = with_further_layer(base)
    said = Said()
    token = progress._display.set(said)
    small = prune(base, keep_even(base), out=tmp_path / "small")
    progress._display.reset(token)
    assert said.lines == [
        "layers that predict further tokens (MTP) are left out: no plan knows them"
    ]
    assert not any(name.startswith("model.layers.3.") for name in tensors(small))
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, small))
    further = {name for name in before if name in ("num_nextn_predict_layers", "num_mtp_layers")}
    assert further
    assert all(after[name] == 0 for name in further)
    same = prune(base, keep_even(base, tuple(range(8))), out=tmp_path / "same")
    assert_same(tensors(same), held)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ("model.layers.1.mlp.other.weight", "has no such tensor"),
        ("model.layers.1.mlp.gate.bias", r"the rows of the router that it goes to are \(8, 32\)"),
        ("model.layers.1.mlp.experts.8.up_proj.weight", "9 experts have such a tensor, of 8"),
    ],
)
def test_what_is_not_certain_is_refused(tensor, why, tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base")
    save_changed(base, lambda held: held.update({tensor: torch.ones(3, 5)}))
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        prune(base, keep_even(base), out=tmp_path / "small")
    assert tensor in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.gate.weight", "model.layers.2.mlp.experts.3.up_proj.weight"]
)
def test_a_missing_router_or_expert_is_refused(tensor, tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base")
    save_changed(base, lambda held: held.pop(tensor))
    with pytest.raises(
        (DataError, UnsupportedModelError), match=r"layers\.\d\.mlp\.(gate|experts)"
    ):
        prune(base, keep_even(base), out=tmp_path / "small")


def test_rows_that_are_not_finite_are_refused(tmp_path):
    base = models.save("mixtral", tmp_path / "base")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    save_changed(base, lambda held: held[name][3, 2].fill_(torch.nan))
    with pytest.raises(DataError, match=rf"weight {name} holds NaN"):
        prune(base, keep_even(base), out=tmp_path / "small")


def test_tied_experts_are_refused():
    model = models.build("mixtral")
    parts = routed_parts(find_moe_layers(model), model.state_dict())
    check_untied(model, parts)
    first, second = (f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1))
    assert {first, second} <= set(parts)
    model.all_tied_weights_keys = {first: second}
    with pytest.raises(UnsupportedModelError, match=rf"{first} and {second} are one tensor"):
        check_untied(model, parts)


@pytest.mark.parametrize("given", ["loaded", "padded"])
def test_further_layers_are_not_counted_where_the_model_was_built(given, tmp_path):
    base = models.save("deepseek_v3", tmp_path / "base")
    with_further_layer(base)
    keep = keep_even(base)
    if given == "loaded":
        prune(load_model(base)[0], keep, out=tmp_path / "small")
    else:
        keep.keep[2] = (1, 3, 5)
        prune(base, keep, out=tmp_path / "small", uneven="pad")
    assert not any(name.startswith("model.layers.3.") for name in tensors(tmp_path / "small"))
    assert json.loads((base / "config.json").read_text())["num_nextn_predict_layers"] == 1
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["n_routed_experts"] == 4


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_quantisation_beside_the_configuration_names_no_expert(name, tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base")
    left_out = ["model.layers.1.mlp.experts.7.up_proj"]
    (base / name).write_text(json.dumps({"quantization": {"exclude_modules": left_out}}))
    with pytest.raises(UnsupportedModelError, match=rf"{name} names single experts"):
        prune(base, keep_even(base), out=tmp_path / "small")
    (base / name).write_text(json.dumps({"quantization": {"exclude_modules": ["lm_head"]}}))
    assert (prune(base, keep_even(base), out=tmp_path / "small") / name).exists()
