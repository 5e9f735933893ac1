"""A model on disk, one layer at a time, records what the whole model does."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import models
import wild
from moecollab import plan, progress, score
from moecollab.cli.main import app
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.manifest import digest_file, read_json
from moecollab.models import checkpoint, conversion
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.loading import digest_model, load_model
from moecollab.models.masking import mask
from moecollab.models.streamed import StreamedModel
from moecollab.record import extraction, shelf, windows
from moecollab.record.activations import load_activations
from moecollab.record.extraction import extract
from moecollab.record.layerwise import LayerReader
from moecollab.record.run import Run
from moecollab.record.shelf import Shelf
from moecollab.record.sums import GROUPS

ALL = [*models.FAMILIES, *wild.FAMILIES]


def files(folder):
    """Digests of all files of a folder."""
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


def assert_same(one, other):
    """Same experts, and numbers that differ by rounding at most."""
    assert one.layers == other.layers
    for layer in one.layers:
        first, second = one.layer(layer), other.layer(layer)
        np.testing.assert_array_equal(first.expert, second.expert)
        np.testing.assert_allclose(first.weight, second.weight, rtol=0, atol=1e-5)
        np.testing.assert_allclose(first.norm, second.norm, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 60 tokens, so that the texts make several."""
    group = windows.group_shards
    monkeypatch.setattr(extraction, "group_shards", lambda samples: group(samples, 60))


@pytest.mark.parametrize("name", ALL)
def test_same_as_the_whole_model(name, texts, tmp_path):
    folder = wild.save(name, tmp_path / "model")
    # Documents of other lengths than the context: windows, and batches with padding.
    whole = extract(folder, texts, out=tmp_path / "whole", context=48, batch_size=3)
    layered = extract(
        folder, texts, out=tmp_path / "layered", context=48, batch_size=3, layer_by_layer=True
    )
    assert_same(layered, whole)
    # So a run may be stopped in one way and go on in the other.
    assert read_json(layered.path / "manifest.json") == read_json(whole.path / "manifest.json")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jamba"])
def test_shards_of_single_experts_in_bfloat16(name, texts, tmp_path):
    folder = wild.save(name, tmp_path / "model", tie_word_embeddings=True)
    model = load_model(folder, "bfloat16")[0]
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    named = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert len(set(named.values())) > 2
    assert any(".experts.0." in key for key in named)
    assert not any("lm_head" in key for key in named)
    whole = extract(folder, texts, out=tmp_path / "whole")
    layered = extract(folder, texts, out=tmp_path / "layered", layer_by_layer=True)
    assert_same(layered, whole)
    assert read_json(layered.path / "manifest.json")["settings"]["dtype"] == "bfloat16"


def test_another_dtype_and_no_norms(model_folder, texts, tmp_path):
    settings = {"dtype": "bfloat16", "norms": False}
    whole = extract(model_folder, texts, out=tmp_path / "whole", **settings)
    layered = extract(model_folder, texts, out=tmp_path / "l", layer_by_layer=True, **settings)
    assert files(layered.path) == files(whole.path)


def test_every_sum(texts, tmp_path, small_shards):
    folder = models.save("qwen3_moe", tmp_path / "model")
    settings = {"collect": [group for group in GROUPS if group not in ("routing", "norms")]}
    whole = extract(folder, texts, out=tmp_path / "whole", **settings)
    layered = extract(folder, texts, out=tmp_path / "l", layer_by_layer=True, **settings)
    assert files(layered.path) == files(whole.path)


def test_masked_model(family, texts, tmp_path):
    folder = models.save(family, tmp_path / "model")
    acts = extract(folder, texts, out=tmp_path / "acts")
    chosen = plan(score("frequency", acts), drop=0.25)
    mask(folder, chosen, out=tmp_path / "masked")
    whole = extract(tmp_path / "masked", texts, out=tmp_path / "whole")
    layered = extract(tmp_path / "masked", texts, out=tmp_path / "layered", layer_by_layer=True)
    assert files(layered.path) == files(whole.path)
    assert files(whole.path) != files(acts.path)


def test_digest_is_that_of_the_whole_model(family, tmp_path):
    folder = models.save(family, tmp_path / "model")
    streamed = StreamedModel(folder)
    with streamed.outside():
        assert streamed.digest(lambda: None) == digest_model(load_model(folder)[0])
    assert all(value.is_meta for value in streamed.model.state_dict().values())


def test_one_layer_is_in_memory(model_folder):
    streamed = StreamedModel(model_folder)
    with streamed.outside(), streamed.layer(1):
        held = {name for name, value in streamed.model.state_dict().items() if not value.is_meta}
    assert any(name.startswith("model.layers.1.") for name in held)
    assert not any(name.startswith(("model.layers.0.", "lm_head")) for name in held)
    tensors = load_model(model_folder)[0].state_dict().items()
    assert streamed.weight_bytes == sum(value.nbytes for _, value in tensors)
    layer = sum(value.nbytes for name, value in tensors if name.startswith("model.layers.1."))
    assert layer <= streamed.layer_bytes <= 2 * layer


def test_memory_is_told_beforehand(model_folder, texts, tmp_path):
    told = []

    class Display:
        def open(self, what, total):
            return progress._Silent()

        def close(self, bar):
            pass

        def say(self, text):
            told.append(text)

    token = progress._display.set(Display())
    try:
        extract(model_folder, texts, out=tmp_path / "acts", layer_by_layer=True)
    finally:
        progress._display.reset(token)
    told = [text for text in told if text.startswith("layer by layer")]
    assert len(told) == 1
    assert told[0].startswith("layer by layer: about 0.00")
    assert "one layer" in told[0]
    assert "hidden states" in told[0]


def test_memory_for_sums_is_that_of_the_tallies(model_folder, texts, tmp_path):
    groups = ("routing", "norms", "channels", "pairs", "vocabulary")
    reader = LayerReader(StreamedModel(model_folder), hidden_gb=1, groups=groups)
    reader.n_domains = 2
    found = extract(model_folder, texts, out=tmp_path / "acts", collect=groups[2:]).tallies()
    assert reader._sums_bytes(groups) == sum(one.nbytes for one in found.arrays.values())
    assert reader._shard_bytes() == found["sum_output"].nbytes + found["sum_output_sq"].nbytes


def test_too_many_hidden_states_go_to_disk(
    model_folder, texts, tmp_path, monkeypatch, small_shards
):
    spilled = []
    put = Shelf._spill
    monkeypatch.setattr(Shelf, "_spill", lambda *args: (spilled.append(1), put(*args)))
    whole = extract(model_folder, texts, out=tmp_path / "whole")
    settings = {"layer_by_layer": True, "hidden_gb": 0}
    layered = extract(model_folder, texts, out=tmp_path / "layered", **settings)
    assert spilled
    assert files(layered.path) == files(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layered", "whole"]


def test_shards_are_read_together_as_far_as_they_fit(model_folder):
    reader = LayerReader(StreamedModel(model_folder), hidden_gb=1e-6)
    token = 32 * 4 + 3 * 2 * 18  # a hidden state, and 18 bytes for each of 2 slots in 3 layers
    fitting = 1000 // token
    assert reader.group([fitting - 1, 1, 1]) == 2
    assert reader.group([10**6, 1]) == 1
    assert reader.group([]) == 0
    with pytest.raises(SettingsError, match="hidden_gb is -1; it must be 0 or more"):
        LayerReader(StreamedModel(model_folder), hidden_gb=-1)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_stopped_run_goes_on(model_folder, texts, tmp_path, monkeypatch, small_shards, error):
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    settings = {"out": tmp_path / "acts", "layer_by_layer": True, "hidden_gb": 1e-6}
    rounds = []
    run = LayerReader._run

    def dying(self, number, *others):
        rounds.append(number)
        if rounds.count(2) == 2:
            raise error
        run(self, number, *others)

    with monkeypatch.context() as patch:
        patch.setattr(LayerReader, "_run", dying)
        with pytest.raises(error):
            extract(model_folder, texts, **settings)
    partial = tmp_path / ".acts.partial"
    assert [path.name for path in partial.glob("shard*")] == ["shard-00000.safetensors"]
    rounds.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LayerReader, "_run", lambda *args: (rounds.append(args[1]), run(*args))[1])
        assert files(extract(model_folder, texts, **settings).path) == whole
    assert 0 < rounds.count(0) < 4


def test_run_begun_whole_goes_on_layer_by_layer(
    model_folder, texts, tmp_path, monkeypatch, small_shards
):
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    write = extraction.ShardStore.write

    def dying(self, number, arrays):
        write(self, number, arrays)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(extraction.ShardStore, "write", dying)
        with pytest.raises(Killed):
            extract(model_folder, texts, out=tmp_path / "acts")
    done = tmp_path / ".acts.partial" / "shard-00000.safetensors"
    before = done.stat().st_mtime_ns
    seen = []
    fill = Run.fill
    monkeypatch.setattr(
        Run,
        "fill",
        lambda *args: (seen.append(done.stat().st_mtime_ns), fill(*args))[1],
    )
    assert (
        files(extract(model_folder, texts, out=tmp_path / "acts", layer_by_layer=True).path)
        == whole
    )
    assert seen == [before]


LIMITED = """
import resource, sys
import torch
import transformers.models.mixtral.modeling_mixtral
from moecollab.errors import MoeCollabError
from moecollab.record.activations import load_activations
from moecollab.record.extraction import extract
torch.set_num_threads(1)
data = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = int(data.split()[1]) * 1024 + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
texts = ["word %d and more " % number * 9 for number in range(4)]
extract(sys.argv[1], texts, out=sys.argv[2], layer_by_layer=sys.argv[4] == "yes")
"""


def save_large(folder):
    """A Mixtral of 0.7 GB in 24 layers, and its size."""
    with torch.device("meta"):
        model = models.build("mixtral", **LARGE)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_(-0.05, 0.05)
    model.save_pretrained(folder, max_shard_size="200MB")
    models.build_tokenizer().save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


LARGE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 24}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_model_three_times_its_memory(tmp_path):
    folder = tmp_path / "model"
    size = save_large(folder)

    def run(how):
        command = [sys.executable, "-c", LIMITED, folder, tmp_path / how, str(size // 3), how]
        return subprocess.run([str(one) for one in command], capture_output=True, text=True)

    try:
        whole, layered = run("no"), run("yes")
    finally:
        shutil.rmtree(folder)
    assert whole.returncode != 0
    assert "emory" in whole.stderr
    assert layered.returncode == 0, layered.stderr
    assert len(load_activations(tmp_path / "yes").layers) == LARGE["num_hidden_layers"]


def test_tensors_are_read_as_safetensors_does(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor([True, False, True]),
        "e": torch.zeros(0, 4),
        "f": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint.open(str(tmp_path))
    assert found.tensors.keys() == tensors.keys()
    with found.unread(tensors) as unread:
        for key, value in load_file(tmp_path / "model.safetensors").items():
            torch.testing.assert_close(unread[key][...], value, rtol=0, atol=0)
            assert unread[key].get_shape() == list(value.shape)


def test_tensors_are_read_where_the_system_has_no_preadv(tmp_path, monkeypatch):
    tensors = {f"t{number}": torch.randn(50, 41) for number in range(40)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.delattr(os, "preadv", raising=False)
    spec = importlib.util.spec_from_file_location("elsewhere", checkpoint.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    spec.loader.exec_module(module)
    with (
        module.Checkpoint.open(str(tmp_path)).unread(tensors) as unread,
        ThreadPoolExecutor(4) as threads,  # as the loader of transformers has them
    ):
        read = list(threads.map(lambda key: unread[key][...], tensors))
    assert all(map(torch.equal, read, tensors.values()))


def test_a_file_that_is_cut_while_it_is_read_is_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5000)}, path, metadata={"format": "pt"})
    with Checkpoint.open(str(tmp_path)).unread(["a"]) as unread:
        os.truncate(path, 1000)
        with pytest.raises(DataError, match=r"damaged \(it ends within a tensor"):
            unread["a"][...]


@pytest.fixture
def folder(tmp_path):
    """A model's folder in several files, that may be damaged."""
    folder = models.save("mixtral", tmp_path / "model")
    load_model(folder)[0].save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    return folder


def refusal(folder, tmp_path, texts, **settings):
    """What extract says, which must be one line, before or after which nothing is lost."""
    with pytest.raises((DataError, UnsupportedModelError, SettingsError)) as caught:
        extract(folder, texts, out=tmp_path / "acts", layer_by_layer=True, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "acts").exists()
    return str(caught.value)


def test_file_that_the_index_names_is_missing(folder, tmp_path, texts):
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    assert "lacks model-" in refusal(folder, tmp_path, texts)


def test_truncated_files(folder, tmp_path, texts):
    file = sorted(folder.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) - 3):
        file.write_bytes(whole[:length])
        assert f"{file} is truncated or damaged (" in refusal(folder, tmp_path, texts)
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    assert f"{file} is truncated or damaged (" in refusal(folder, tmp_path, texts)


def edit(folder, change):
    """Changes the tensors of the file that holds the second layer's router, and the index."""
    index = folder / "model.safetensors.index.json"
    named = read_json(index)
    key = next(key for key in named["weight_map"] if ".layers.1." in key and "gate.weight" in key)
    file = folder / named["weight_map"][key]
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors, key)
    save_file(tensors, file, metadata={"format": "pt"})
    kept = {k: v for k, v in named["weight_map"].items() if v != file.name or k in tensors}
    index.write_text(json.dumps(named | {"weight_map": kept}))
    return key


def test_missing_weight_of_a_layer(folder, tmp_path, texts):
    key = edit(folder, lambda tensors, key: tensors.pop(key))
    told = refusal(folder, tmp_path, texts)
    assert f"lacks the weight {key.replace('block_sparse_moe', 'mlp')}" in told


def test_weight_that_is_not_where_the_index_says(folder, tmp_path, texts):
    index = folder / "model.safetensors.index.json"
    named = read_json(index)
    first, *_, last = sorted(set(named["weight_map"].values()))
    key = next(key for key, value in named["weight_map"].items() if value == first)
    named["weight_map"][key] = last
    index.write_text(json.dumps(named))
    assert f"{last} in {folder} lacks the weight {key}" in refusal(folder, tmp_path, texts)


def test_missing_expert(folder, tmp_path, texts):
    index = folder / "model.safetensors.index.json"
    named = read_json(index)
    key = next(key for key in named["weight_map"] if ".layers.1." in key and "experts.3.w" in key)
    file = folder / named["weight_map"].pop(key)
    left = {name: value for name, value in load_file(file).items() if name != key}
    save_file(left, file)
    index.write_text(json.dumps(named))
    told = refusal(folder, tmp_path, texts)
    assert "the weight model.layers.1.mlp.experts." in told
    assert "the checkpoint is incomplete" in told


def test_weight_that_is_not_finite(folder, tmp_path, texts):
    edit(folder, lambda tensors, key: tensors[key].view(-1)[0].fill_(torch.inf))
    assert "weight model.layers.1.mlp.gate.weight holds NaN" in refusal(folder, tmp_path, texts)


def test_full_disk(folder, tmp_path, texts, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf.torch, "save", full)
    told = refusal(folder, tmp_path, texts, hidden_gb=0)
    assert "hidden states cannot be written to" in told
    assert "No space left on device" in told
    monkeypatch.undo()
    assert len(extract(folder, texts, out=tmp_path / "acts", layer_by_layer=True).layers) == 3


def test_models_that_are_not_streamed(folder, tmp_path, texts):
    told = refusal(models.build("mixtral"), tmp_path, texts, tokenizer=models.build_tokenizer())
    assert "layer_by_layer is True; it must be False for a model that is loaded" in told
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "holds no safetensors" in refusal(folder, tmp_path, texts)
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "are quantised; record the model without" in refusal(folder, tmp_path, texts)


def test_another_transformers(folder, tmp_path, texts, monkeypatch):
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    told = refusal(folder, tmp_path, texts)
    assert "loads weights in another way than this version of moecollab knows" in told
    assert conversion.transformers.__version__ in told


def test_command(model_folder, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Owls hunt at night.\n\nBadgers do as well.\n")
    command = ["extract", str(model_folder), str(corpus), "--out", str(tmp_path / "acts")]
    shown = CliRunner().invoke(app, [*command, "--layer-by-layer", "--hidden-gb", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert "layer by layer: about" in shown.stderr
    assert len(load_activations(tmp_path / "acts").layers) == 3


def test_layers_that_share_keys_and_values(tmp_path, texts):
    kinds = ["sliding_attention", "full_attention"] * 2
    folder = wild.save("gemma4", tmp_path / "model", num_kv_shared_layers=2, layer_types=kinds)
    told = refusal(folder, tmp_path, texts, context=32)
    assert "Gemma4ForCausalLM lets layers share what they keep; record it without" in told
