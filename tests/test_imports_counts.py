"""Sources that count without single tokens: llama.cpp's tools and REAP."""

import json
import shutil

import numpy as np
import pytest
import torch

import dumps
import moecollab as mc
from moecollab.errors import (
    DataError,
    MissingInputError,
    SchemaError,
    SettingsError,
    ShapeError,
)
from test_imports import found

TRUTH = dumps.make_truth((20, 10), seed=2)
NORMS = np.random.default_rng(0).uniform(1, 2, TRUTH.ids.shape)
COUNTS = dumps.counts_of(TRUTH)
WEIGHTED = dumps.sums_of(TRUTH, TRUTH.weights * NORMS)


def json_file(tmp_path, value=None, name="expert_stats.json"):
    value = dumps.llamacpp_json(TRUTH, NORMS) if value is None else value
    (tmp_path / name).write_text(json.dumps(value))
    return tmp_path / name


def csv_file(tmp_path, text):
    (tmp_path / "moe_trace.csv").write_text(text)
    return tmp_path / "moe_trace.csv"


def read(tmp_path, files, kind="llamacpp", **options):
    return mc.import_routing(kind, files, out=tmp_path / "counts", overwrite=True, **options)


def test_json_sums(tmp_path):
    counts = read(tmp_path, json_file(tmp_path))
    assert isinstance(counts, mc.RoutingCounts)
    assert (counts.layers, counts.n_experts, counts.top_k) == ((1, 2, 4), 8, 3)
    assert counts.recorded == ("count", "sum_weight", "sum_weighted_norm")
    assert found(counts) == {}
    assert repr(counts).startswith("RoutingCounts(imported from llamacpp: 3 MoE layers × 8 exp")
    assert (mc.score("frequency", counts).values == COUNTS).all()
    expected = dumps.sums_of(TRUTH, TRUTH.weights)
    np.testing.assert_allclose(mc.score("gate_sum", counts).values, expected)
    np.testing.assert_allclose(mc.score("reap", counts.path).values, WEIGHTED / COUNTS)
    scores = mc.score("esft_gate", counts, out=tmp_path / "scores.parquet")
    np.testing.assert_allclose(scores.values, expected / 30)
    assert mc.plan(tmp_path / "scores.parquet", drop=0.25).n_experts == 8


def test_what_was_not_recorded_is_no_number(tmp_path):
    tallies = read(tmp_path, json_file(tmp_path)).tallies()
    for name in ("sum_norm", "sum_weight_sq", "sum_norm_sq", "max_abs"):
        assert name not in tallies
        with pytest.raises(MissingInputError, match=f"{name} was not recorded"):
            tallies[name]


def test_shards_add_up_and_domains_stay_apart(tmp_path):
    value = dumps.llamacpp_json(TRUTH, NORMS)
    files = [json_file(tmp_path, value, f"{at}.json") for at in range(2)]
    counts = read(tmp_path, files)
    assert (counts.tallies().total().count == 2 * COUNTS).all()
    assert counts.top_k == 3
    files.append(json_file(tmp_path, value | {"domain": "law"}, "law.json"))
    counts = read(tmp_path, files)
    assert counts.domains == ("law", "text")
    assert (counts.tallies().count == np.array([COUNTS, 2 * COUNTS])).all()
    assert read(tmp_path, files, domain="all").domains == ("all",)


def test_layers_that_do_not_add_up_are_flagged(tmp_path):
    value = dumps.llamacpp_json(TRUTH, NORMS)
    value["layers"]["2"]["cnt"] = (COUNTS[1] // 2).tolist()
    assert found(read(tmp_path, json_file(tmp_path, value))) == {"uneven_layers": 1}


def choices(header):
    rows = [
        f"{layer},{expert}"
        for row, layer in enumerate(TRUTH.layers)
        for expert in TRUTH.ids[:, row].ravel()
    ]
    return "\n".join([*(["layer,expert"] if header else []), *rows]) + "\n"


@pytest.mark.parametrize("header", [True, False])
def test_csv_of_single_choices(tmp_path, header):
    counts = read(tmp_path, csv_file(tmp_path, choices(header)), top_k=3, experts=8)
    assert counts.recorded == ("count",)
    assert (mc.score("frequency", counts).values == COUNTS).all()
    with pytest.raises(SettingsError, match=r"top_k is None; it must be given, .* count tokens"):
        read(tmp_path, csv_file(tmp_path, choices(header)), experts=8)
    with pytest.raises(SettingsError, match="experts is None; it must be given, since moe_trace"):
        read(tmp_path, csv_file(tmp_path, choices(header)), top_k=3)
    with pytest.raises(DataError, match=r"line \d+: expert id \d, but ids are in \[0, 4\)"):
        read(tmp_path, csv_file(tmp_path, choices(header)), top_k=3, experts=4)


@pytest.mark.parametrize("name", ["hits", "count"])
def test_csv_of_sums(tmp_path, name):
    rows = [
        f"{layer},{expert},{COUNTS[row, expert]},30,{COUNTS[row, expert] / 4}"
        for row, layer in enumerate(TRUTH.layers)
        for expert in range(8)
    ]
    text = "\n".join([f"layer,expert,{name},layer_rows,weight", *rows])
    counts = read(tmp_path, csv_file(tmp_path, text), top_k=3, experts=8)
    assert (mc.score("frequency", counts).values == COUNTS).all()
    np.testing.assert_allclose(mc.score("gate_sum", counts).values, COUNTS / 4)


def test_reap(tmp_path):
    path = dumps.write_pt(tmp_path / "observations.pt", dumps.reap_observations(TRUTH, NORMS))
    counts = read(tmp_path, path, "reap")
    assert counts.top_k == 3
    assert counts.recorded == ("count", "sum_weight", "sum_norm", "sum_weighted_norm")
    np.testing.assert_allclose(mc.score("reap", counts).values, WEIGHTED / COUNTS)
    np.testing.assert_allclose(counts.tallies().total()["sum_norm"], dumps.sums_of(TRUTH, NORMS))


def test_reap_files_of_another_kind(tmp_path):
    def given(value):
        return read(tmp_path, dumps.write_pt(tmp_path / "o.pt", value), "reap", top_k=3)

    whole = dumps.reap_observations(TRUTH, NORMS)
    with pytest.raises(SchemaError, match="is no dictionary by layer"):
        given(torch.ones(3))
    with pytest.raises(SchemaError, match="layer model is no layer with its sums"):
        given({"model": whole[1]})
    with pytest.raises(SchemaError, match="layer 1 lacks expert_frequency"):
        given({1: {"ean_sum": torch.ones(8)}})
    with pytest.raises(DataError, match="layer 1 expert_frequency: expert 0 has nan, but sums"):
        given({1: whole[1] | {"expert_frequency": torch.full((8,), float("nan"))}})
    with pytest.raises(ShapeError, match=r"expert_frequency has shape \(8, 8\), expected one"):
        given({1: whole[1] | {"expert_frequency": torch.ones(8, 8)}})
    with pytest.raises(DataError, match="counts that are not whole numbers"):
        given({1: whole[1] | {"expert_frequency": torch.full((8,), 0.5)}})
    with pytest.raises(DataError, match="the files count no token"):
        given({1: {"expert_frequency": torch.zeros(8)}})
    del whole[1]["weighted_ean_sum"]
    with pytest.raises(MissingInputError, match="needs output norms"):
        mc.score("reap", given(whole))


BROKEN = {
    "layers": ({"layers": []}, "layers holds list, expected an object"),
    "named": ({"layers": {"a": {}}}, "layer a is not named by its index"),
    "empty": ({"layers": {}}, "holds no layers"),
    "counts": ({"layers": {"1": {"gate": [1]}}}, "lacks counts"),
    "negative": ({"layers": {"1": {"cnt": [1, -1]}}}, "cnt: expert 1 has -1.0, but sums are"),
    "text": ({"layers": {"1": {"cnt": ["many"]}}}, "cnt is not a list of numbers"),
    "width": ({"n_expert": 3, "layers": {"1": {"cnt": [1]}}}, "1 of count, but n_expert is 3"),
    "choices": ({"tokens": 2, "layers": {"1": {"cnt": [3]}}}, "3 choices of 2 tokens, which is no"),
    "tokens": ({"tokens": -2, "layers": {"1": {"cnt": [3]}}}, "tokens holds -2 where a count"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json(tmp_path, name):
    value, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        read(tmp_path, json_file(tmp_path, value))
    assert not (tmp_path / "counts").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,rank\n1,2\n", r"columns \['layer', 'rank'\]; layer and expert"),
        ("layer,expert\n", "holds no rows"),
        ("layer,expert\n1,\n", "values in expert that are no indices"),
        ("layer,expert\n1,-1\n", "values in expert that are no indices"),
        ("layer,expert\n1,x\n", "values in expert that are no indices"),
        ("layer,expert,hits\n1,2,nan\n", "expert 0 has nan, but sums"),
        ("", "is empty"),
    ],
)
def test_broken_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, csv_file(tmp_path, text), top_k=1, experts=8)


def test_models_are_not_mixed(tmp_path):
    value = dumps.llamacpp_json(TRUTH, NORMS)
    fewer = dumps.llamacpp_json(TRUTH, NORMS)
    del fewer["layers"]["4"]
    files = [json_file(tmp_path, one, f"{at}.json") for at, one in enumerate((value, fewer))]
    with pytest.raises(DataError, match=r"holds layers \[1, 2\], others \[1, 2, 4\]"):
        read(tmp_path, files)
    with pytest.raises(DataError, match="layer 1 has 8 experts, expected 4"):
        read(tmp_path, files[0], experts=4)
    with pytest.raises(SettingsError, match=r"layers is .* must be 3 indices"):
        read(tmp_path, files[0], layers=(0, 1))


def test_counts_are_not_activations(tmp_path):
    counts = read(tmp_path, json_file(tmp_path))
    with pytest.raises(SchemaError, match="holds counts without single tokens, which can be"):
        mc.load_activations(counts.path)
    assert mc.load_counts(counts.path).digest() == counts.digest()
    with pytest.raises(DataError, match="holds no counts"):
        mc.load_counts(tmp_path)
    broken = shutil.copytree(counts.path, tmp_path / "broken")
    (broken / "tallies.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="truncated or damaged"):
        mc.load_counts(broken)
    note = json.loads((broken / "manifest.json").read_text())
    del note["recorded"]
    (broken / "manifest.json").write_text(json.dumps(note))
    with pytest.raises(SchemaError, match="lacks 'recorded'"):
        mc.load_counts(broken)
