"""Opening models: what is wrong is said in one sentence."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.models import loading
from moecollab.models.loading import check_finite, digest_model, load_model
from moecollab.models.routing import find_moe_layers
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder


@pytest.fixture
def folder(tmp_path):
    """A model's folder that may be damaged."""
    return models.save("mixtral", tmp_path / "model")


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_path_gives_model_and_tokenizer(model_folder):
    model, tokenizer = load_model(model_folder)
    assert not model.training
    assert tokenizer("a")["input_ids"]
    assert model.dtype == torch.float32


def test_dtype(model_folder):
    assert load_model(model_folder, "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(SettingsError, match="dtype is 'int4'; it must be one of auto, float32"):
        load_model(model_folder, "int4")


def test_folder_without_tokenizer(tmp_path):
    models.build("mixtral").save_pretrained(tmp_path)
    assert load_model(tmp_path)[1] is None


def test_loaded_model_is_returned():
    model = models.build("mixtral").train()
    assert load_model(model)[0] is model
    assert model.training


def test_dense_model(tmp_path):
    models.build_dense().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a dense model"):
        load_model(tmp_path)


def test_dense_model_where_it_may_be(tmp_path):
    models.build_dense().save_pretrained(tmp_path)
    assert load_model(tmp_path, moe=False)[0].config.model_type == "llama"
    assert load_model(models.build_dense(), moe=False)[0].config.model_type == "llama"


def test_unreachable_name():
    with pytest.raises(DataError, match=r"no-one/no-model cannot be loaded as a model: .*; give a"):
        load_model("no-one/no-model")


def test_folder_without_config(tmp_path):
    with pytest.raises(DataError, match=r"holds no config\.json; give the folder of"):
        load_model(tmp_path)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"are truncated or damaged .*; download or"):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot be loaded as a model: .* no file named"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded as a model"):
        load_model(folder)


def test_missing_weight(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(DataError, match=r"lacks the weight model\.norm\.weight; the checkpoint is"):
        load_model(folder)


def test_config_with_another_count(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 6}))
    with pytest.raises(DataError, match="cannot be loaded as a model"):
        load_model(folder)


def test_nan_weight_is_named(folder):
    def spoil(tensors):
        name = next(name for name in tensors if "layers.2" in name and "experts.5" in name)
        tensors[name][0, 0] = torch.nan

    edit_weights(folder, spoil)
    with pytest.raises(DataError, match=r"weight model\.layers\.2\.mlp\.experts\.\w+ holds NaN"):
        load_model(folder)


def test_large_weights_are_no_error():
    model = models.build("mixtral")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert load_model(model)[0] is model


def test_digest_of_a_model():
    digest = digest_model(models.build("mixtral"))
    assert digest == digest_model(models.build("mixtral"))
    others = [models.build("mixtral", seed=1), models.build("mixtral", rms_norm_eps=1e-3)]
    assert len({digest, *map(digest_model, others)}) == 3


def test_nan_in_a_correction_bias_is_named():
    model = models.build("deepseek_v3")
    biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    biases[0][0] = float("nan")
    with pytest.raises(DataError, match="e_score_correction_bias"):
        check_finite(model)


def test_damaged_tokenizer_is_named(tmp_path):
    folder = models.save("qwen2_moe", tmp_path / "model")
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"tokenizer in .* is damaged"):
        load_model(folder)


def recorded(model, token_ids):
    """Routing of some tokens."""
    layers = find_moe_layers(model)
    with torch.inference_mode(), Recorder(layers, norms=True) as recorder:
        model.base_model(input_ids=token_ids, use_cache=False)
        return recorder.take(torch.ones(token_ids.numel(), dtype=torch.bool))


@pytest.mark.parametrize("disk", [(), (1,), (0, 1, 2)])
def test_weights_spread_by_accelerate(folder, tmp_path, token_ids, disk):
    pytest.importorskip("accelerate")
    whole = recorded(load_model(folder)[0], token_ids)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{n}": "disk" if n in disk else "cpu" for n in range(3)}
    device_map = device_map | {"lm_head": "cpu"} if disk else {"": "cpu"}
    model, tokenizer = load_model(
        folder, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert any(value.is_meta for value in model.parameters()) == bool(disk)
    for one, other in zip(recorded(model, token_ids), whole, strict=True):
        np.testing.assert_array_equal(one.expert, other.expert)
        np.testing.assert_allclose(one.weight, other.weight, rtol=0, atol=1e-6)
    text = ["A text for a model in pieces."]
    spread = extract(model, text, out=tmp_path / "spread", tokenizer=tokenizer)
    expected = extract(folder, text, out=tmp_path / "whole")
    np.testing.assert_array_equal(spread.layer(1).expert, expected.layer(1).expert)


def test_device_map_by_itself(folder):
    pytest.importorskip("accelerate")
    model, _ = load_model(folder, device_map="auto")
    assert not any(value.is_meta for value in model.parameters())
    with pytest.raises(SettingsError, match="device is 'cpu'; it must be None where device_map"):
        load_model(folder, device="cpu", device_map="auto")


def test_device_map_needs_accelerate(folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match="needs accelerate, which is not installed; run pip"):
        load_model(folder, device_map="auto")
