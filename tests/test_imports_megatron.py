"""Router traces of Megatron-Core."""

import numpy as np
import pytest

import dumps
import moecollab as mc
from moecollab.errors import DataError, SchemaError, SettingsError, ShapeError
from test_imports import found, same


@pytest.fixture
def truth():
    return dumps.make_truth()


@pytest.fixture
def lines(truth):
    return dumps.megatron_trace(truth)


def read(tmp_path, *files, **options):
    paths = [
        dumps.write_jsonl(tmp_path / f"router_trace_rank{rank}.jsonl", lines)
        for rank, lines in enumerate(files)
    ]
    options = {"experts": 8, "overwrite": True} | options
    return mc.import_routing("megatron", paths, out=tmp_path / "acts", **options)


def test_round_trip(tmp_path, truth, lines):
    acts = read(tmp_path, lines)
    assert same(acts, truth, weights=False, tokens=False)
    assert found(acts) == {}
    assert not acts.has_weights


def test_a_folder_may_hold_other_files(tmp_path, truth, lines):
    (tmp_path / "trace").mkdir()
    dumps.write_jsonl(tmp_path / "trace" / "router_trace_rank0.jsonl", lines)
    (tmp_path / "trace" / "hidden_states_rank0.bin").write_bytes(b"\x00\x01")
    acts = mc.import_routing("megatron", tmp_path / "trace", out=tmp_path / "acts", experts=8)
    assert same(acts, truth, weights=False, tokens=False)


def test_ranks_are_samples_of_their_own_unless_they_see_the_same(tmp_path, truth, lines):
    other = dumps.megatron_trace(dumps.make_truth((4, 2), seed=1), rank=1)
    acts = read(tmp_path, lines, other)
    assert acts.samples()["n_tokens"].to_list() == [5, 1, 7, 4, 2]
    again = read(tmp_path, lines, dumps.megatron_trace(truth, rank=1))
    assert found(again) == {"duplicate_files": 1}
    assert same(again, truth, weights=False, tokens=False)


def test_micro_batches_of_a_step_are_told_apart(tmp_path, truth, lines):
    acts = read(tmp_path, [line | {"step": 0} for line in lines])
    assert same(acts, truth, weights=False, tokens=False)


def test_multi_token_prediction_is_left_out(tmp_path, truth, lines):
    extra = lines[0] | {"block": "mtp", "mtp_idx": 0}
    acts = read(tmp_path, [*lines, extra])
    assert same(acts, truth, weights=False, tokens=False)
    assert found(acts) == {"other_passes": 1}


def test_batches_that_lack_a_layer_are_left_out(tmp_path, lines):
    acts = read(tmp_path, lines[:-1])
    assert found(acts) == {"missing_tokens": 7}
    assert acts.samples()["n_tokens"].to_list() == [5, 1]


def test_stages_of_a_pipeline_cannot_be_joined(tmp_path, lines):
    stages = [[line for line in lines if (line["layer"] < 3) == low] for low in (True, False)]
    with pytest.raises(DataError, match=r"layers \[1, 2, 4\] but no batch with all of them: ranks"):
        read(tmp_path, *stages)


def test_an_empty_batch_is_nothing(tmp_path, truth, lines):
    empty = [
        line | {"step": 9, "num_tokens": 0, "top_indices": []} for line in lines[:3]
    ]  # fmt: skip
    assert same(read(tmp_path, [*lines, *empty]), truth, weights=False, tokens=False)


def test_broken_lines(tmp_path, lines):
    def first(**changes):
        return read(tmp_path, [lines[0] | changes, *lines[1:]])

    with pytest.raises(
        ShapeError, match=r"line 1 has top_indices of shape \(5, 3\), but says \(6, "
    ):
        first(num_tokens=6)
    with pytest.raises(SchemaError, match="line 1 has no layer; give router traces"):
        first(layer=None)
    with pytest.raises(DataError, match="rank holds -1 where a count belongs"):
        first(rank=-1)
    with pytest.raises(DataError, match="holds float64 where whole numbers belong"):
        first(top_indices=[[float("nan")] * 3] * 5)
    with pytest.raises(DataError, match="rows of different lengths"):
        first(top_indices=[[1], [1, 2]])
    with pytest.raises(
        ShapeError, match=r"step 0 micro-batch 0 has layers of shapes \[\(2, 3\), \(5"
    ):
        first(num_tokens=2, top_indices=lines[0]["top_indices"][:2])
    with pytest.raises(DataError, match=r"step 0 micro-batch 0, row 1, layer 1: experts \[3, 3, 1"):
        first(top_indices=[[0, 1, 2], [3, 3, 1], *np.tile([0, 1, 2], (3, 1)).tolist()])
    with pytest.raises(SettingsError, match="experts is None"):
        read(tmp_path, lines, experts=None)
    path = tmp_path / "cut.jsonl"
    whole = dumps.write_jsonl(path, lines).read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cut.jsonl line 9 is not valid JSON; it may be truncated"):
        mc.import_routing("megatron", path, out=tmp_path / "x", experts=8)
