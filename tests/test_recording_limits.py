"""What a recording does with odd models, texts and disks."""

import errno

import numpy as np
import pytest
import torch

import models
from moecollab.errors import DataError, OutputExistsError
from moecollab.manifest import digest_file
from moecollab.models.loading import load_model
from moecollab.models.routing import find_moe_layers
from moecollab.record import extraction, run, shards, windows
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder
from moecollab.record.tallying import Tokens, tally


def files(folder):
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


def test_tokenizer_of_another_model_is_named(texts, tokenizer, tmp_path):
    model = models.build("mixtral")

    def foreign(text, **options):
        return {"input_ids": [*tokenizer(text, **options)["input_ids"], 50_000]}

    message = "the tokenizer makes token id 50000, but the model knows 260 ids"
    with pytest.raises(DataError, match=message):
        extract(model, texts, out=tmp_path / "acts", tokenizer=foreign)
    assert not list(tmp_path.iterdir())


def test_a_batch_of_padding_alone_adds_nothing(token_ids):
    model = models.build("mixtral")
    layers = find_moe_layers(model)
    nothing = torch.zeros(token_ids.numel(), dtype=torch.bool)
    with torch.inference_mode(), Recorder(layers, norms=True, channels=True) as recorder:
        recorder.begin(nothing)
        model(input_ids=token_ids)
        found = recorder.take(nothing)
    empty = np.zeros(0, np.int64)
    sums = tally(("law",), Tokens(empty, empty, empty), found, 8, ("routing", "norms", "channels"))
    assert all(not value.any() for value in sums.arrays.values())
    assert found[0].expert.shape == (0, 2)


def test_an_expert_that_is_never_chosen_has_sums_of_zero(model_folder, texts, tokenizer, tmp_path):
    model, _ = load_model(model_folder)
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        # Of a, -a, b, -b two are above 0 for every token, so with top 2 expert 3 never is.
        gate[2], gate[1], gate[4], gate[3] = -gate[0], gate[5], -gate[5], 0
    acts = extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer, collect="channels")
    never = acts.tallies().total().count == 0
    assert never[1, 3]
    for name, value in acts.tallies().total().arrays.items():
        assert not value[never].any(), name
        assert np.isfinite(value).all(), name


def test_a_full_disk_loses_nothing(model_folder, texts, tmp_path, monkeypatch):
    group = windows.group_shards
    monkeypatch.setattr(extraction, "group_shards", lambda samples: group(samples, 60))
    whole = files(extract(model_folder, texts, out=tmp_path / "whole").path)
    write, written = shards.write_tensors, []

    def full(path, data, **options):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            extract(model_folder, texts, out=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", lambda *a, **o: (written.append(a), write(*a, **o)))
        assert files(extract(model_folder, texts, out=tmp_path / "acts").path) == whole
    assert len(written) == 4, "two shards were there already"


def test_documents_that_are_cut_are_counted(model_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(run, "say", said.append)
    extract(model_folder, ["a b c d e f g h " * 9, "short"], out=tmp_path / "acts", context=16)
    assert len(said) == 1
    assert said[0].startswith("1 of 2 documents are longer than the context of 16 tokens")


def test_a_run_killed_while_it_cleans_up_is_finished(model_folder, texts, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(_store):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardStore, "close", die)
        with pytest.raises(Killed):
            extract(model_folder, texts, out=tmp_path / "acts")
    before = files(tmp_path / "acts")
    with pytest.raises(OutputExistsError):
        extract(model_folder, texts, out=tmp_path / "acts", norms=False)
    assert files(extract(model_folder, texts, out=tmp_path / "acts").path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["acts"]


def test_a_recording_that_another_process_finished_first_stays(
    model_folder, texts, tmp_path, monkeypatch
):
    whole = []
    select = extraction.select_samples

    def slow(*args, **options):
        monkeypatch.setattr(extraction, "select_samples", select)
        whole.append(files(extract(model_folder, texts[:1], out=tmp_path / "acts").path))
        return select(*args, **options)

    monkeypatch.setattr(extraction, "select_samples", slow)
    with pytest.raises(OutputExistsError):
        extract(model_folder, texts, out=tmp_path / "acts")
    assert files(tmp_path / "acts") == whole[0]
