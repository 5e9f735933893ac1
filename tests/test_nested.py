"""The text's experts are found in models that also see and hear, and in models without a head."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import models
import zoo
from moecollab.errors import UnsupportedModelError
from moecollab.models.keep import Keep
from moecollab.models.loading import load_model
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.pruning import prune
from moecollab.record.recorder import Recorder

_EYE = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
_EAR = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "adapter_in_dim": 16,
    "adapter_out_dim": 32,
}
WHOLE = {
    "qwen3_vl_moe": {
        "vision_config": _EYE | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    },
    "ernie4_5_vl_moe": {"vision_config": _EYE},
    "gemma4": {"vision_config": None, "audio_config": None},
    "llama4": {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        }
    },
}

pytestmark = pytest.mark.filterwarnings("ignore")


def build_whole(name):
    """A random model of a family with its other senses."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    text = zoo.make_config(f"{name}_text").to_dict()
    config = CONFIG_MAPPING[name](text_config=text, **WHOLE[name])
    torch.manual_seed(0)
    return zoo.randomised(AutoModelForImageTextToText.from_config(config))


def ids_of(model):
    layers, inputs = find_moe_layers(model), zoo.batch()
    real = inputs["attention_mask"].bool().reshape(-1)
    with torch.inference_mode(), Recorder(layers, norms=True) as recorder:
        model(**inputs)
        return layers, recorder.take(real)


@pytest.mark.parametrize("name", WHOLE)
def test_text_experts_of_whole_models(name):
    layers, seen = ids_of(build_whole(name))
    assert all("language_model" in layer.name for layer in layers)
    alone = find_moe_layers(zoo.build(f"{name}_text"))
    assert [layer.layer for layer in layers] == [layer.layer for layer in alone]
    assert all(len(one.expert) == 20 for one in seen)


def test_whole_model_is_loaded_from_its_folder(tmp_path):
    model = build_whole("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model)
    _, before = ids_of(model)
    _, after = ids_of(loaded)
    assert all((one.expert == two.expert).all() for one, two in zip(before, after, strict=True))


def test_whole_model_is_cut_and_loaded_again(tmp_path):
    model, inputs = build_whole("qwen3_vl_moe"), zoo.batch()
    layers = find_moe_layers(model)
    keep = Keep({layer.layer: (0, 2, 3, 5, 7) for layer in layers}, 8, 2)
    with Mask(model, keep):
        masked = zoo.output_of(model, inputs)
    model.save_pretrained(tmp_path / "base")
    prune(tmp_path / "base", keep, out=tmp_path / "streamed", verify=True)
    prune(model, keep, out=tmp_path / "pruned")
    streamed, cut = (
        load_file(tmp_path / part / "model.safetensors") for part in ("streamed", "pruned")
    )
    assert streamed.keys() == cut.keys()
    assert all(torch.equal(streamed[name], value) for name, value in cut.items())
    loaded, _ = load_model(tmp_path / "streamed", device="cpu")
    assert {layer.n_experts for layer in find_moe_layers(loaded)} == {5}
    torch.testing.assert_close(zoo.output_of(loaded, inputs), masked, rtol=0, atol=5e-6)


def test_experts_for_images_are_left_alone():
    eye = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "adapter_in_dim": 16,
        "adapter_out_dim": 32,
        "moe_intermediate_size": 8,
        "pyramid_num_routed": [-1, 4],
    }
    if "dots3_note" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no dots3_note")
    text = zoo.make_config("dots3_note_text").to_dict()
    config = CONFIG_MAPPING["dots3_note"](text_config=text, vision_config=eye, audio_config=_EAR)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    containers = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    layers = find_moe_layers(model)
    assert any("vision" in name for name in containers)
    assert not any("vision" in layer.name for layer in layers)
    assert len(layers) == len(containers) - 1


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "jetmoe", "dbrx"])
def test_model_without_a_head(name):
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    config = zoo.make_config(name)
    bare, full = (auto.from_config(config) for auto in (AutoModel, AutoModelForCausalLM))
    expected = [(layer.layer, layer.n_experts, layer.top_k) for layer in find_moe_layers(full)]
    found = find_moe_layers(zoo.randomised(bare))
    assert [(layer.layer, layer.n_experts, layer.top_k) for layer in found] == expected
    layers, seen = ids_of(bare)
    assert len(seen) == len(layers)


def test_family_that_cannot_be_recorded_says_why():
    model = models.build("mixtral")
    model.config.model_type = "doge"
    with pytest.raises(UnsupportedModelError, match="its experts are rows of embeddings"):
        find_moe_layers(model)
