"""Speed and size: what is counted can be counted again, what is timed is sane."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import models
from moecollab.errors import DataError
from moecollab.evaluation.batching import in_batches, rows_that_fit
from moecollab.evaluation.differences import SIZE, SPEED, differences
from moecollab.evaluation.evaluation import evaluate, load_evaluation
from moecollab.evaluation.usage import _on_disk, measure_usage
from moecollab.models.masking import mask
from moecollab.pruning.plans import Plan
from moecollab.pruning.pruning import prune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def plan():
    keep = {layer: tuple(range(4)) for layer in range(3)}
    return SimpleNamespace(keep=keep, n_experts=models.N_EXPERTS, top_k=models.TOP_K)


@pytest.fixture(scope="module")
def full(folder):
    return evaluate(folder, speed=True, name="full")


def test_sizes_are_those_of_the_files(folder, full):
    held = load_file(folder / "model.safetensors")
    assert full.usage.parameters == sum(one.numel() for one in held.values())
    assert full.usage.disk_bytes == (folder / "model.safetensors").stat().st_size
    assert 0 <= full.usage.weight_bytes - 4 * full.usage.parameters < 1000  # and small buffers
    assert full.usage.resident_bytes > full.usage.weight_bytes


def test_rounds_and_medians(full, tmp_path):
    usage = full.usage
    assert (usage.batch, usage.prompt_tokens, usage.new_tokens) == (1, 52, 12)  # 64 in all
    assert len(usage.prefill) == len(usage.decode) == 5
    assert usage.decode_speed == sorted(usage.decode)[2]
    assert usage.prefill_speed == sorted(usage.prefill)[2]
    assert usage.prefill_speed > usage.decode_speed  # reading runs tokens together
    full.save(tmp_path / "e.json")
    assert load_evaluation(tmp_path / "e.json").usage == usage
    assert "tokens/s" in repr(full)


def test_a_mask_keeps_every_expert(folder, full, plan, tmp_path):
    with mask(str(folder), plan) as held:
        masked = evaluate(held, speed=True, name="masked")
    rows = 3 * 4 * 32  # of the routers: all that a mask takes
    assert masked.usage.parameters == full.usage.parameters - rows
    assert masked.usage.disk_bytes == full.usage.disk_bytes
    assert 1 / 5 < masked.usage.decode_speed / full.usage.decode_speed < 5
    table = differences({"full": full, "masked": masked})
    speed = table.filter(measure=SPEED, model="masked")
    assert speed["metric"].to_list() == ["prefill, tokens/s", "decode, tokens/s"]
    for row in speed.iter_rows(named=True):
        assert row["low"] <= row["value"] <= row["high"]
        assert row["difference"] != 0
        assert row["difference_low"] is None  # rounds are no pairs
    sizes = table.filter(measure=SIZE, model="masked")
    assert dict(zip(sizes["metric"], sizes["difference"], strict=True))["parameters"] == -rows


def test_only_the_files_that_are_loaded_are_counted(folder, tmp_path):
    """A second copy of the weights in another naming is none of theirs."""
    copied = shutil.copytree(folder, tmp_path / "m")
    whole = copied / "model.safetensors"
    size = whole.stat().st_size
    shutil.copy(whole, copied / "consolidated.safetensors")
    assert _on_disk(copied) == size
    whole.rename(copied / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _on_disk(copied) == size
    assert _on_disk(tmp_path / "nowhere") is None


def test_speed_is_that_of_all_rounds_whatever_the_model_asks_for(monkeypatch):
    """Within no time, or with a token that stops it, as many tokens are written."""
    model = models.build("qwen2_moe")
    model.generation_config.max_time = 1e-9
    model.generation_config.suppress_tokens = [5]
    own, plain = model.generation_config, model.generation_config.to_dict()
    written, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **asked: written.append(generate(**asked)), raising=False
    )
    usage = measure_usage(model, None, window=20, seed=0)
    assert {one.shape[1] for one in written} == {usage.prompt_tokens + usage.new_tokens}
    assert model.generation_config is own
    assert own.to_dict() == plain


def test_a_batch_takes_a_quarter_of_memory():
    model = models.build("qwen2_moe")
    row = 64 * 4 * (3 * models.VOCABULARY + 16 * 32)
    for free, rows in ((0, 1), (4 * row, 1), (4 * 3 * row, 2), (4 * 4 * row, 4), (None, 8)):
        assert rows_that_fit(model, 64, free) == rows


def test_automatic_batches_shrink_where_memory_is_short():
    model, tried = models.build("qwen2_moe"), []

    def work(size):
        tried.append(size)
        if size > 2:
            raise DataError("lm-eval failed") from RuntimeError("can't allocate memory: 1 byte")
        return size

    assert in_batches("auto", model, 64, work) == 2
    assert tried == [8, 4, 2]
    with pytest.raises(DataError):
        in_batches(4, model, 64, work)


def test_a_pruned_checkpoint_is_smaller(folder, full, plan, tmp_path):
    fields = {"criterion": "frequency", "drop": 0.5, "per": "layer"}
    prune(str(folder), Plan(**vars(plan), **fields), out=tmp_path / "cut")
    found = evaluate(tmp_path / "cut", speed=True)
    assert found.usage.disk_bytes < full.usage.disk_bytes
    # An expert has three matrices of 32 × 16, and 32 weights in the router.
    gone = 3 * 4 * (3 * 32 * 16 + 32)
    assert found.usage.parameters == full.usage.parameters - gone
