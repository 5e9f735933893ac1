"""Shards of a recording on disk: what is written, read back, joined and cleaned up."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import models
from moecollab.errors import DataError, SettingsError, StaleInputError
from moecollab.manifest import digest_file
from moecollab.models.layout import Layout
from moecollab.models.registry import (
    layout_digest,
    layout_of,
    register_layout,
    unregister_layout,
)
from moecollab.record import extraction, run, shards, windows
from moecollab.record.extraction import extract
from moecollab.record.schema import write_parts, write_table
from moecollab.record.shards import ShardStore
from moecollab.record.shelf import Shelf
from moecollab.record.tensors import write_tensors


class Killed(BaseException):
    """Stands for the end of the process."""


def files(folder):
    return {path.name: digest_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 60 tokens, so that the texts make four."""
    group = windows.group_shards
    monkeypatch.setattr(extraction, "group_shards", lambda samples: group(samples, 60))


@pytest.fixture
def whole(model_folder, texts, tmp_path):
    return files(extract(model_folder, texts, out=tmp_path / "whole", collect="channels").path)


def stop(monkeypatch, name, given, *, before):
    """Ends the recording at the second call of a method of the store."""
    method, calls = getattr(ShardStore, name), []

    def dying(self, *args):
        calls.append(args)
        if len(calls) == 2 and before:
            raise Killed
        method(self, *args)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, name, dying)
        with pytest.raises(Killed):
            extract(**given)


@pytest.mark.parametrize("name", ["keep", "write"])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_between_sums_and_columns_adds_nothing_twice(
    model_folder, texts, tmp_path, monkeypatch, whole, name, before
):
    given = {"model": model_folder, "corpus": texts, "out": tmp_path / "acts"}
    given["collect"] = "channels"
    stop(monkeypatch, name, given, before=before)
    assert files(extract(**given).path) == whole


def test_shards_without_sums_or_arrays_are_made_again(
    model_folder, texts, tmp_path, monkeypatch, whole
):
    given = {"model": model_folder, "corpus": texts, "out": tmp_path / "acts"}
    given["collect"] = "channels"
    stop(monkeypatch, "write", given, before=False)
    partial = tmp_path / ".acts.partial"
    first = partial / "shard-00000.safetensors"
    arrays = load_file(first)
    write_tensors(first, {name: value for name, value in arrays.items() if name != "norm.0"})
    sums = partial / "tallies.safetensors"
    sums.write_bytes(sums.read_bytes()[:-5])
    assert files(extract(**given).path) == whole


def test_only_a_shard_that_lacks_an_array_is_made_again(
    model_folder, texts, tmp_path, monkeypatch, whole
):
    given = {"model": model_folder, "corpus": texts, "out": tmp_path / "acts"}
    given["collect"] = "channels"
    stop(monkeypatch, "write", given, before=False)
    first = tmp_path / ".acts.partial" / "shard-00000.safetensors"
    arrays = load_file(first)
    write_tensors(first, {name: value for name, value in arrays.items() if name != "norm.0"})
    filled, fill = [], run.Run.fill
    monkeypatch.setattr(
        run.Run,
        "fill",
        lambda self, number, *rest: filled.append(number) or fill(self, number, *rest),
    )
    assert files(extract(**given).path) == whole
    assert filled == [0, 2, 3]


def test_a_shard_that_vanishes_while_tables_are_written_is_named(
    model_folder, texts, tmp_path, monkeypatch
):
    names = ShardStore.names
    monkeypatch.setattr(shards.ShardStore, "has", lambda *_: True)
    monkeypatch.setattr(
        ShardStore, "names", lambda self, layer: names(self, layer) | {"norm": "norm.99"}
    )
    message = "shard 0 of .* is missing, damaged or lacks an array; run extract again"
    with pytest.raises(DataError, match=message):
        extract(model_folder, texts, out=tmp_path / "acts")


def test_a_run_that_goes_on_says_what_it_found(model_folder, texts, tmp_path, monkeypatch):
    given = {"model": model_folder, "corpus": texts, "out": tmp_path / "acts"}
    stop(monkeypatch, "write", given, before=False)
    said = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, steps=1):
            pass

        def remark(self, text):
            said.append(text)

    monkeypatch.setattr(extraction, "track", lambda *_: Bar())
    extract(**given)
    assert said == ["found 2 of 4 shards"]


def test_a_run_does_not_go_on_with_another_layout(tmp_path, texts, tokenizer, monkeypatch):
    model = models.build("mixtral")
    model.config.model_type = "my_moe"
    for layer in model.model.layers:
        layer.mlp.factor = 2.0
    mine = replace(layout_of("mixtral", ""), family="my_moe")
    given = {"model": model, "corpus": texts, "out": tmp_path / "acts", "collect": "shift"}
    given["tokenizer"] = tokenizer
    register_layout(mine)
    try:
        stop(monkeypatch, "write", given, before=False)
        register_layout(replace(mine, scale="factor"), replace=True)
        with pytest.raises(StaleInputError, match=r"with another inputs\.layout;"):
            extract(**given)
        register_layout(replace(mine, remark="the same"), replace=True)
        assert extract(**given).n_samples == len(texts)
    finally:
        unregister_layout("my_moe")


def test_digests_of_layouts_see_the_code_of_their_functions():
    def made(factor):
        source = f"lambda block, output: (output[0] * {factor}, 1 if block in {{'a', 'b'}} else 2)"
        return layout_digest(Layout(family="my_moe", count="n", routing=eval(source)))

    assert made(1) == made(1) != made(2)
    assert layout_digest(layout_of("mixtral", "")) is None


def test_what_a_killed_replacement_left_is_removed(model_folder, texts, tmp_path):
    left, other = tmp_path / ".acts.old.x1y2", tmp_path / ".acts.old.partial"
    (left / "old").mkdir(parents=True)
    (left / "old" / "manifest.json").write_text("{}")
    other.mkdir()
    (other / "lock").touch()  # the work folder of a recording that is called "acts.old"
    extract(model_folder, texts, out=tmp_path / "acts")
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize("metadata", [None, {"about": "é"}])
def test_tensors_are_what_safetensors_reads(tmp_path, metadata):
    rng = np.random.default_rng(0)
    arrays = {
        kind: (rng.random((3, 5)) * 200).astype(kind)
        for kind in ("uint8", "uint16", "int32", "int64", "float32", "float64")
    }
    arrays |= {"empty": np.zeros((0, 4), np.uint16), "turned": arrays["float32"].T}
    write_tensors(tmp_path / "a.safetensors", arrays, metadata)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == metadata


def table(n_rows):
    rng = np.random.default_rng(n_rows)
    columns = {"token": pl.UInt32(), "expert": pl.Array(pl.UInt16(), 3)}
    values = {"token": np.arange(n_rows), "expert": rng.integers(0, 99, (n_rows, 3), np.uint16)}
    return pl.DataFrame(values, schema=columns), columns


@pytest.mark.parametrize("n_rows", [1, 65_536, 150_001])
def test_parts_are_written_as_the_whole_table_would_be(tmp_path, n_rows):
    whole, columns = table(n_rows)
    write_table(whole, tmp_path / "whole")
    parts = (whole[start : start + 8_209] for start in range(0, n_rows, 8_209))
    write_parts(parts, columns, tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_spilled_file_that_is_cut_short_is_named(tmp_path):
    with Shelf(tmp_path / "hidden", 0, torch.device("cpu")) as shelf:
        shelf.put(3, torch.arange(1000))
        file = tmp_path / "hidden" / "3.pt"
        for size in (file.stat().st_size // 2, 3, 0):
            file.write_bytes(file.read_bytes()[:size])
            with pytest.raises(DataError, match=r"3.pt, which holds hidden states .* damaged"):
                shelf.get(3)


def test_layers_of_a_table_are_a_sequence(acts):
    with pytest.raises(SettingsError, match=r"layers is 1; it must be a sequence, such as \[1\]"):
        acts.to_polars(1)


def test_sums_that_are_slow_to_write_are_written_less_often(
    monkeypatch, model_folder, texts, tmp_path, whole
):
    """A kill after the third of four shards: the two since the sums were written are made again."""
    clock, kept, put = [0.0], [], []
    keep, write = ShardStore.keep, ShardStore.write

    def slowly(self, sums, n_shards):
        keep(self, sums, n_shards)
        kept.append(n_shards)
        clock[0] += 2.0

    def counting(self, number, *arguments):
        write(self, number, *arguments)
        put.append(number)
        if put == [0, 1, 2]:
            raise Killed

    monkeypatch.setattr(run, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ShardStore, "keep", slowly)
    monkeypatch.setattr(ShardStore, "write", counting)
    with pytest.raises(Killed):
        extract(model_folder, texts, out=tmp_path / "acts", collect="channels")
    assert kept == [1]
    acts = extract(model_folder, texts, out=tmp_path / "acts", collect="channels")
    assert put[3:] == [1, 2, 3]
    assert files(acts.path) == whole
