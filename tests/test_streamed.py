"""A folder that is pruned file by file holds, bit by bit, what pruning in memory writes."""

import difflib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
import zoo
from moecollab.errors import DataError, PlanError, SettingsError, UnsupportedModelError
from moecollab.models import loading
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.models.uneven import Arrangement
from moecollab.pruning.counts import FURTHER
from moecollab.pruning.pruning import prune
from moecollab.pruning.streaming.config import smaller_config
from moecollab.pruning.streaming.numbering import numbered
from moecollab.pruning.streaming.shards import parse_size
from streamed import assert_same, keep_even, tensors
from test_families import SPREAD, keep_of

pytestmark = pytest.mark.filterwarnings("ignore")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-families")
        metafunc.parametrize("name", zoo.ZOO if every else SPREAD)


def changed_fields(one, other, path=""):
    """Names of all that differs between two configurations."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(set(one) | set(other))
        return [name for key in keys for name in changed_fields(one.get(key), other.get(key), key)]
    return [] if one == other else [path]


def buildable(monkeypatch, kind):
    """Lets folders of a class be opened that no automatic class of transformers finds."""

    class Opened:
        from_pretrained = kind.from_pretrained

        @staticmethod
        def from_config(config, **settings):
            return kind._from_config(config, **settings)

    monkeypatch.setattr(loading, "_auto_class", lambda _config: Opened)


def test_streamed_equals_in_memory_equals_masked(name, tmp_path, monkeypatch):
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    model, inputs = zoo.build(name), zoo.batch()
    layers = find_moe_layers(model)
    buildable(monkeypatch, type(model))
    model.save_pretrained(tmp_path / "base")
    keep = keep_of(layers)
    if layers[0].layout.fixed or layers[0].layout.uncut:
        with pytest.raises(UnsupportedModelError, match="cut yet"):
            prune(tmp_path / "base", keep, out=tmp_path / "streamed")
        assert not (tmp_path / "streamed").exists()
        return
    with Mask(model, keep):
        masked = zoo.output_of(model, inputs)
    prune(tmp_path / "base", keep, out=tmp_path / "streamed", shard_size="40kB", verify=True)
    prune(model, keep, out=tmp_path / "memory")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    assert_same(tensors(tmp_path / "streamed"), tensors(tmp_path / "memory"))
    base, streamed, memory = (
        json.loads((tmp_path / part / "config.json").read_text())
        for part in ("base", "streamed", "memory")
    )
    counts = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
    if len(keep.keep[layers[0].layer]) < layers[0].n_experts:
        assert streamed | dict.fromkeys(set(FURTHER) & set(streamed), 0) == memory
        assert changed_fields(base, streamed)
    assert set(changed_fields(base, streamed)) <= counts
    again = type(model).from_pretrained(tmp_path / "streamed").eval()
    torch.testing.assert_close(zoo.output_of(again, inputs), masked, rtol=0, atol=1e-5)


def test_dropping_nothing_copies_every_byte(family, tmp_path):
    base = models.save(family, tmp_path / "base")
    out = prune(base, keep_even(base, tuple(range(8))), out=tmp_path / "same", verify=True)
    for file in base.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in base.iterdir()),
        *("moecollab.json", "README.md"),
    }


def test_twice_is_once_by_both(family, tmp_path):
    base = models.save(family, tmp_path / "base")
    first = prune(base, keep_even(base, (0, 1, 3, 4, 6, 7)), out=tmp_path / "first")
    twice = prune(first, keep_even(first, (1, 2, 5), 6), out=tmp_path / "twice")
    once = prune(base, keep_even(base, (1, 3, 7)), out=tmp_path / "once")
    assert_same(tensors(twice), tensors(once))
    assert (twice / "config.json").read_text() == (once / "config.json").read_text()


def test_shards_of_another_size_hold_the_same(tmp_path):
    base = tmp_path / "base"
    models.build("qwen3_moe").save_pretrained(base, max_shard_size="30kB")
    whole = prune(base, keep_even(base), out=tmp_path / "whole")
    parts = prune(base, keep_even(base), out=tmp_path / "parts", shard_size="20kB")
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]
    assert not (whole / "model.safetensors.index.json").exists()
    files = sorted(parts.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same(tensors(whole), tensors(parts))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_files_are_those_of_the_reference_library(tmp_path):
    mixed = {
        f"{kind}.{number}": torch.zeros(number + 1, dtype=dtype)
        for number in range(3)
        for kind, dtype in enumerate((torch.bool, torch.float32, torch.int64, torch.bfloat16))
    }
    base = models.save("olmoe", tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held |= {
        f"model.layers.0.self_attn.q_proj.weight.{name}": value for name, value in mixed.items()
    }
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    out = prune(base, keep_even(base, tuple(range(8))), out=tmp_path / "same")
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_loads_in_a_fresh_process_without_us(tmp_path, token_ids, logits):
    base = models.save("qwen3_moe", tmp_path / "base")
    out = prune(base, keep_even(base), out=tmp_path / "small")
    expected = logits(AutoModelForCausalLM.from_pretrained(out).eval(), token_ids)
    torch.save((token_ids, expected), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=False).eval()
AutoTokenizer.from_pretrained({str(out)!r}, trust_remote_code=False)
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.inference_mode():
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    model.generate(ids[:1], max_new_tokens=2, do_sample=False)
assert not any(name.startswith("moecollab") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            Keep({0: (0, 1, 2), 1: (0, 1, 2)}, 8, 2),
            r"layers \[0, 1\] but the model has \[0, 1, 2\]",
        ),
        (Keep(dict.fromkeys(range(3), (0, 1, 2)), 16, 2), "16"),
        (Keep(dict.fromkeys(range(3), (0,)), 8, 2), "layer 0"),
        (Keep({0: (0, 1), 1: (0, 1, 2), 2: (0, 1)}, 8, 2), "has one number for all"),
    ],
)
def test_plans_that_do_not_fit_are_refused(keep, message, tmp_path):
    base = models.save("mixtral", tmp_path / "base")
    with pytest.raises(PlanError, match=message):
        prune(base, keep, out=tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_broken_groups_are_refused(tmp_path):
    base = models.save("deepseek_v3", tmp_path / "base", n_group=2, topk_group=1)
    with pytest.raises(PlanError, match=r"layer 1 keeps \[4, 2\] experts in its 2 router groups"):
        prune(base, keep_even(base, (0, 1, 2, 3, 4, 5)), out=tmp_path / "small")


def test_verify_needs_a_folder(tmp_path):
    with pytest.raises(SettingsError, match="verify is True"):
        prune(models.build("mixtral"), Keep({}, 8, 2), out=tmp_path / "small", verify=True)


CONFIGS = {
    "one line": '{"model_type": "qwen3_moe", "num_experts": 8, "x": [1,  2]}',
    "old name": '{\n\t"num_experts" : 8,\n\t"num_experts_per_tok": 2,\n\t"rope": {"num": 8}\n}\n',
    "both": '{\n  "num_experts": 8,\n  "other": 8,\n  "num_local_experts": 8\n}',
    "below another of that name": '{"draft": {"num_experts": 8}, "num_experts": 8}',
    "none": '{"model_type": "qwen3_moe"}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_nothing_but_the_count_changes_in_a_configuration(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    five = Keep(dict.fromkeys((1, 2), (0, 1, 2, 3, 4)), 8, 2)
    arrangement = Arrangement(five, five, native=False)
    changed = smaller_config(path, models.build("qwen3_moe"), arrangement, without_mtp=False)
    before = json.loads(text)
    assert json.loads(changed) == before | {"num_experts": 5, "num_local_experts": 5}
    if "num_experts" in before:
        matcher = difflib.SequenceMatcher(None, text, changed, autojunk=False)
        lost = [
            text[a:b] for kind, a, b, _, _ in matcher.get_opcodes() if kind in ("replace", "delete")
        ]
        assert set(lost) <= {"8"}


def test_a_configuration_that_names_experts_is_refused(tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["left_alone"] = ["model.layers.1.mlp.experts.3.up_proj"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="names single experts"):
        prune(base, keep_even(base), out=tmp_path / "small")


def test_other_files_go_along(tmp_path):
    base = models.save("mixtral", tmp_path / "base")
    along = ["LICENSE", "chat_template.jinja", "modeling.py", "merges.txt"]
    left = ["pytorch_model.bin", "model.gguf", ".gitattributes", "manifest.json"]
    for name in [*along, *left, "README.md", "BASE_README.md"]:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("rag")
    out = prune(base, keep_even(base), out=tmp_path / "small")
    assert all((out / name).read_text() == name for name in along)
    assert (out / "BASE_README.md").read_text() == "README.md"
    assert (out / "BASE_BASE_README.md").read_text() == "BASE_README.md"
    assert (out / "README.md").read_text().startswith("---\n")
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    assert not any((out / name).exists() for name in left)
    shutil.rmtree(out)
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"vocab\.txt, which lies outside"):
        prune(base, keep_even(base), out=out)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 kB", 1500), ("2MiB", 2 << 20), (700, 700), ("1g", 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(SettingsError, match="shard_size is"):
        parse_size(text)


def test_numbers_of_experts_are_told_from_other_numbers():
    keys = [f"layers.1.experts.{i}.{j}.w" for i in range(2) for j in range(2)]
    found = numbered([*keys, "layers.1.experts.1.only", "layers.1.experts.all"], 2)
    assert {key: place.number for key, place in found.items()} == {
        key: int(key.split(".")[3]) for key in [*keys, "layers.1.experts.1.only"]
    }
    assert numbered(["layers.0.experts.w"], 1) == {}
    assert numbered([f"layers.1.experts.{i}.w" for i in (0, 1, 3)], 4) == {}
