"""What is recorded is what the model computed; runs resume and repeat exactly."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.nn import functional

import models
from moecollab.errors import (
    DataError,
    OutputExistsError,
    SettingsError,
    StaleInputError,
    UnsupportedModelError,
)
from moecollab.manifest import digest_file
from moecollab.models.loading import load_model
from moecollab.models.routing import find_moe_layers
from moecollab.record import extraction, windows
from moecollab.record.activations import load_activations
from moecollab.record.corpus import read_corpus
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder


def files(folder):
    """Digests of all files of a folder, hidden ones too; bytes would make a failure unreadable."""
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


def expert_output(experts, number, hidden):
    """One expert on all tokens, by its definition: (n_tokens, hidden)."""
    gate, up = functional.linear(hidden, experts.gate_up_proj[number]).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, experts.down_proj[number])


def shared_output(block, hidden):
    """What the block adds to the routed experts."""
    if hasattr(block, "shared_expert"):
        gate = torch.sigmoid(block.shared_expert_gate(hidden))
        return gate * block.shared_expert(hidden)
    return block.shared_experts(hidden) if hasattr(block, "shared_experts") else 0.0


def seen_by_blocks(model, layers):
    """Inputs and outputs of all blocks, filled when the model runs; and the hooks."""
    seen = {}

    def keep(number):
        def hook(_module, args, output):
            shape = (-1, args[0].shape[-1])
            seen[number] = (args[0].reshape(shape).clone(), output.reshape(shape).clone())

        return hook

    return seen, [layer.block.register_forward_hook(keep(layer.layer)) for layer in layers]


def test_record_reproduces_every_block(family, token_ids):
    model = models.build(family)
    layers = find_moe_layers(model)
    seen, hooks = seen_by_blocks(model, layers)
    with torch.inference_mode(), Recorder(layers, norms=True) as recorder:
        model(input_ids=token_ids)
        routings = recorder.take(torch.ones(token_ids.numel(), dtype=torch.bool))
        for layer, routing in zip(layers, routings, strict=True):
            hidden, output = seen[layer.layer]
            total = torch.zeros_like(hidden) + shared_output(layer.block, hidden)
            for number in range(layer.n_experts):
                one = expert_output(layer.experts, number, hidden)
                for slot in range(layer.top_k):
                    chosen = torch.from_numpy(routing.expert[:, slot] == number)
                    weight = torch.from_numpy(routing.weight[:, slot])
                    total += one * (weight * chosen)[:, None]
                    close = {"rtol": 0, "atol": 1e-5}
                    norm = torch.from_numpy(routing.norm[:, slot])
                    torch.testing.assert_close(norm[chosen], one.norm(dim=-1)[chosen], **close)
                    peak = torch.from_numpy(routing.peak[:, slot])
                    highest = one.abs().amax(dim=-1)
                    torch.testing.assert_close(peak[chosen], highest[chosen], **close)
            torch.testing.assert_close(total, output, rtol=0, atol=1e-5)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
def test_recording_leaves_logits_as_they_are(family, token_ids, logits, dtype, norms):
    model = models.build(family).to(dtype)
    before = logits(model, token_ids)
    with Recorder(find_moe_layers(model), norms=norms):
        assert torch.equal(logits(model, token_ids), before)
    assert torch.equal(logits(model, token_ids), before)


def test_eager_experts_keep_their_sums(token_ids, logits):
    model = models.build("mixtral")
    model.set_experts_implementation("eager")
    before = logits(model, token_ids)
    with Recorder(find_moe_layers(model), norms=True):
        torch.testing.assert_close(logits(model, token_ids), before, rtol=0, atol=1e-5)


def test_hooks_go_even_after_an_error():
    model = models.build("mixtral")
    layers = find_moe_layers(model)
    with pytest.raises(ZeroDivisionError), Recorder(layers, norms=True):
        raise ZeroDivisionError
    assert not any(layer.experts._forward_hooks for layer in layers)
    assert not any(layer.experts._forward_pre_hooks for layer in layers)


def test_take_needs_one_pass(token_ids):
    model = models.build("mixtral")
    message = "layer 0 saw 0 rows in 0 calls for 24 positions"
    recorder = Recorder(find_moe_layers(model), norms=False)
    with recorder, pytest.raises(DataError, match=message):
        recorder.take(torch.ones(24, dtype=torch.bool))


def test_ids_past_the_experts_and_zero_weights_are_unused(token_ids):
    model = models.build("mixtral")
    layer = find_moe_layers(model)[0]
    with torch.inference_mode(), Recorder([layer], norms=False) as recorder:
        ids = torch.tensor([[8, 3], [1, 2], [4, 5]])
        weights = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.25, 0.75]])
        layer.experts(torch.randn(3, 32), ids, weights)
        (seen,) = recorder.take(torch.tensor([True, True, True]))
    assert seen.expert.tolist() == [[3, 0], [2, 0], [5, 4]]
    np.testing.assert_allclose(seen.weight, [[0.1, 0], [1, 0], [0.75, 0.25]])


def test_padding_and_batches_do_not_matter(model_folder, acts, texts, tmp_path):
    alone = extract(model_folder, texts, out=tmp_path / "alone", batch_size=1)
    for layer in acts.layers:
        one, other = alone.layer(layer), acts.layer(layer)
        assert np.array_equal(one.expert, other.expert)
        np.testing.assert_allclose(one.weight, other.weight, atol=1e-5)
        np.testing.assert_allclose(one.norm, other.norm, atol=1e-4)


def test_long_document_is_cut_into_windows(model_folder, tmp_path):
    text = "abcdefghij" * 5
    whole = extract(model_folder, [text], out=tmp_path / "whole", context=20)
    assert whole.n_samples == 1
    assert whole.tokens()["position"].to_list() == list(range(50))
    pieces = [text[start : start + 20] for start in range(0, 50, 20)]
    parts = extract(model_folder, pieces, out=tmp_path / "parts", context=20)
    for layer in whole.layers:
        assert np.array_equal(whole.layer(layer).expert, parts.layer(layer).expert)


def test_context_is_at_most_the_models_own(acts):
    assert acts.manifest["settings"]["context"] == 64
    assert acts.manifest["model"]["norm_topk"] is False
    assert acts.manifest["inputs"].keys() == {"model", "corpus", "tokens"}


def test_loaded_model_gives_the_same_tables(model_folder, acts, texts, tokenizer, tmp_path):
    model = type(models.build("qwen2_moe")).from_pretrained(model_folder)
    again = extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer)
    ours, theirs = files(again.path), files(acts.path)
    assert ours.keys() == theirs.keys()
    assert ours == theirs


def test_loaded_model_needs_a_tokenizer(texts, tmp_path):
    with pytest.raises(DataError, match="no tokenizer for this model; pass tokenizer="):
        extract(models.build("mixtral"), texts, out=tmp_path / "acts")


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_after(monkeypatch, shards):
    """Makes the recording die before its n-th shard."""
    done = []
    run = extraction._Run.shard

    def shard(self, *args):
        if len(done) == shards:
            raise Killed
        done.append(1)
        return run(self, *args)

    monkeypatch.setattr(extraction._Run, "shard", shard)
    return done


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 60 tokens, so that the texts make several."""
    group = windows.group_shards
    monkeypatch.setattr(extraction, "group_shards", lambda samples: group(samples, 60))


def test_killed_run_resumes_with_the_same_bytes(
    model_folder, texts, tmp_path, monkeypatch, small_shards
):
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            extract(model_folder, texts, out=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()
    with monkeypatch.context() as patch:
        done = kill_after(patch, 9)
        resumed = extract(model_folder, texts, out=tmp_path / "acts")
    assert len(done) == 2
    assert files(resumed.path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "whole"]


def test_other_settings_are_refused_or_start_over(
    model_folder, texts, tmp_path, monkeypatch, small_shards
):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            extract(model_folder, texts, out=tmp_path / "acts")
    changed = r"settings.norms \(True, now False\), settings.tokens \(None, now 100\); repeat"
    with pytest.raises(StaleInputError, match=changed):
        extract(model_folder, texts, out=tmp_path / "acts", norms=False, tokens=100)
    with pytest.raises(StaleInputError, match=r"with another inputs.corpus, inputs.tokens; repeat"):
        extract(model_folder, texts[1:], out=tmp_path / "acts")
    with monkeypatch.context() as patch:
        done = kill_after(patch, 9)
        acts = extract(model_folder, texts, out=tmp_path / "acts", norms=False, overwrite=True)
    assert len(done) == 4
    assert not acts.has_norms


def test_another_process_in_the_same_folder_is_refused(model_folder, texts, tmp_path):
    partial = tmp_path / ".acts.partial"
    partial.mkdir()
    with (
        FileLock(partial / "lock"),
        pytest.raises(DataError, match="another process is recording into"),
    ):
        extract(model_folder, texts, out=tmp_path / "acts")
    assert extract(model_folder, texts, out=tmp_path / "acts").n_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]


def test_damaged_shard_is_made_again(model_folder, texts, tmp_path, monkeypatch, small_shards):
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            extract(model_folder, texts, out=tmp_path / "acts")
    shard = tmp_path / ".acts.partial" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert files(extract(model_folder, texts, out=tmp_path / "acts").path) == whole


SCRIPT = """
import sys
import torch
from moecollab.record import extraction, windows
torch.set_num_threads(1)  # as in the tests: other numbers may round differently
group = windows.group_shards
extraction.group_shards = lambda samples: group(samples, 60)
texts = ["word %d and more " % i * 9 for i in range(400)]
extraction.extract(sys.argv[1], texts, out=sys.argv[2])
"""


@pytest.mark.slow
def test_sigkill_leaves_a_run_that_resumes(model_folder, tmp_path, small_shards):
    texts = [f"word {i} and more " * 9 for i in range(400)]
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    command = [sys.executable, "-c", SCRIPT, str(model_folder), str(tmp_path / "acts")]
    partial = tmp_path / ".acts.partial"
    process = subprocess.Popen(command)
    while process.poll() is None and len(list(partial.glob("shard-*.safetensors"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "acts").exists()
    assert 3 <= len(list(partial.glob("shard-*.safetensors"))) < 400
    assert files(extract(model_folder, texts, out=tmp_path / "acts").path) == whole


def test_limit_takes_from_every_domain_by_seed(model_folder, texts, tmp_path):
    many = [dict(text) for text in texts for _ in range(5)]
    drawn = [
        extract(model_folder, many, out=tmp_path / str(i), tokens=301, seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    assert all(acts.n_tokens == 301 for acts in drawn)
    assert all(acts.domains == ("animals", "law") for acts in drawn)
    assert files(drawn[0].path) == files(drawn[1].path)
    assert drawn[0].manifest["seed"] == 1
    assert drawn[0].digest() != drawn[2].digest()


def byte_ids(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


def test_limit_shares_are_proportional_and_spare_is_passed_on():
    corpus = read_corpus(
        [{"text": "x" * 30, "domain": "a"}] * 30 + [{"text": "y" * 10, "domain": "b"}] * 10
    )
    drawn = windows.select_samples(corpus, byte_ids, limit=100, seed=0)
    share = {d: sum(len(s.ids) for s in drawn if s.document.domain == d) for d in "ab"}
    assert share == {"a": 90, "b": 10}
    everything = windows.select_samples(corpus, byte_ids, limit=10**6, seed=0)
    assert sum(len(sample.ids) for sample in everything) == 1000
    # Shares are by characters, but "é" has two tokens: what "b" cannot fill goes back to "a".
    mixed = read_corpus([{"text": "é" * 50, "domain": "a"}, {"text": "y" * 50, "domain": "b"}])
    drawn = windows.select_samples(mixed, byte_ids, limit=150, seed=0)
    assert [len(sample.ids) for sample in drawn] == [100, 50]


def test_windows_and_shards_cover_everything_once():
    samples = windows.select_samples(
        read_corpus(["a" * n for n in (5, 130, 64, 1, 200)]), byte_ids, limit=None, seed=0
    )
    cut = windows.cut_windows(samples, 64)
    assert sum(len(window.ids) for window in cut) == 400
    assert max(len(window.ids) for window in cut) == 64
    assert [list(shard) for shard in windows.group_shards(samples, 100)] == [[0, 1], [2, 3, 4]]
    batches = windows.group_batches(cut, 3)
    assert sorted(number for batch in batches for number in batch) == list(range(len(cut)))


def test_existing_output(acts, model_folder, texts):
    with pytest.raises(OutputExistsError, match="exists; choose another output or pass overwrite"):
        extract(model_folder, texts, out=acts.path)


def test_overwrite(model_folder, texts, tmp_path):
    first = extract(model_folder, texts[:1], out=tmp_path / "acts")
    second = extract(model_folder, texts[:2], out=tmp_path / "acts", overwrite=True)
    assert (first.n_samples, second.n_samples) == (1, 2)
    assert load_activations(tmp_path / "acts").n_samples == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tokens": 0}, "tokens is 0; it must be 1 or more, or None for all"),
        ({"context": 0}, "context is 0; it must be 1 or more"),
        ({"batch_size": -1}, "batch_size is -1; it must be 1 or more"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_settings_out_of_range(model_folder, texts, tmp_path, setting, message):
    with pytest.raises(SettingsError, match=message):
        extract(model_folder, texts, out=tmp_path / "acts", **setting)
    assert list(tmp_path.iterdir()) == []


def test_empty_corpus(model_folder, tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        extract(model_folder, [" ", ""], out=tmp_path / "acts")


def test_dense_model(texts, tokenizer, tmp_path):
    with pytest.raises(UnsupportedModelError, match="is a dense model"):
        extract(models.build_dense(), texts, out=tmp_path / "acts", tokenizer=tokenizer)


def test_nan_weight_is_named(texts, tokenizer, tmp_path):
    model = models.build("qwen2_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"):
        extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer)


@pytest.mark.parametrize("norms", [False, True])
def test_activations_that_overflow_are_named(texts, tokenizer, tmp_path, norms):
    model = models.build("qwen2_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(3e38)
    layer, what = (1, "expert outputs") if norms else (2, "routing weights")
    with pytest.raises(DataError, match=f"{what} of layer {layer} are not finite"):
        extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer, norms=norms)
    assert not (tmp_path / "acts").exists()


def test_any_number_of_threads_gives_the_same_bytes(tokenizer, tmp_path):
    model = models.build("qwen2_moe", hidden_size=160, moe_intermediate_size=96, num_experts=16)
    text = [f"a cat sat on the mat {i} " * 9 for i in range(12)]
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            found.append(files(extract(model, text, out=out, tokenizer=tokenizer).path))
    finally:
        torch.set_num_threads(1)
    assert found[0] == found[1]


def test_another_tokenizer_starts_over(model_folder, texts, tokenizer, tmp_path):
    """Shards of one tokenizer never stand in for those of another."""
    model, _ = load_model(model_folder)
    first = extract(model, texts, out=tmp_path / "a", tokenizer=tokenizer)

    def shifted(text, **options):
        ids = tokenizer(text, **options)["input_ids"]
        return {"input_ids": [4 + (i + 1) % 200 for i in ids]}

    for name in ("decode", "convert_ids_to_tokens", "batch_decode"):
        setattr(shifted, name, getattr(tokenizer, name))
    second = extract(model, texts, out=tmp_path / "b", tokenizer=shifted)
    assert first.manifest["inputs"]["tokens"] != second.manifest["inputs"]["tokens"]
    assert first.manifest["inputs"]["corpus"] == second.manifest["inputs"]["corpus"]


def test_training_mode_is_given_back(model_folder, texts, tokenizer, tmp_path):
    model, _ = load_model(model_folder)
    model.train()
    extract(model, texts, out=tmp_path / "a", tokenizer=tokenizer)
    assert model.training


def test_a_run_of_the_demos_size_has_shards_to_resume_from():
    document = read_corpus(["x"]).documents[0]
    samples = [windows.Sample(document, np.zeros(230, np.uint32)) for _ in range(171)]
    assert len(windows.group_shards(samples)) >= 4
