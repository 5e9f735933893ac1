"""Routing in responses of vLLM and SGLang."""

import base64
import json

import numpy as np
import pytest

import dumps
import moecollab as mc
from moecollab.errors import (
    DataError,
    MissingInputError,
    SchemaError,
    SettingsError,
    ShapeError,
)
from test_imports import found, same

SHAPE = {"layers": (1, 2, 4), "top_k": 3}


@pytest.fixture
def truth():
    return dumps.make_truth((5, 4, 7))


def read(tmp_path, objects, kind="vllm", **options):
    path = dumps.write_jsonl(tmp_path / "responses.jsonl", objects)
    options = {"experts": 8, "layers": (1, 2, 4), "overwrite": True} | options
    return mc.import_routing(kind, path, out=tmp_path / "acts", **options)


@pytest.mark.parametrize("form", ["lists", "npy", "described"])
def test_vllm_round_trip(tmp_path, truth, form):
    acts = read(tmp_path, dumps.vllm_responses(truth, form=form))
    assert same(acts, truth, weights=False)
    assert found(acts) == {}
    assert acts.domains == ("text",)
    assert acts.vocabulary()[int(truth.token_ids[0])] == f"<{truth.token_ids[0]}>"


def test_vllm_bytes_without_a_shape(tmp_path, truth):
    objects = dumps.vllm_responses(truth, form="bare")
    assert same(read(tmp_path, objects, **SHAPE), truth, weights=False)
    with pytest.raises(DataError, match=r"ids without their shape; say --layers"):
        read(tmp_path, objects, layers=None)
    with pytest.raises(ShapeError, match=r"not uint8 or uint16 or int32 for 3 layers × 2 experts"):
        read(tmp_path, objects, top_k=2)


def cut_last(truth):
    """The truth without the last token of each sample."""
    keep = np.ones(len(truth.ids), bool)
    keep[np.cumsum(truth.lengths) - 1] = False
    lengths = tuple(n - 1 for n in truth.lengths)
    return dumps.Truth(truth.ids[keep], truth.weights[keep], truth.token_ids[keep], lengths)


@pytest.mark.parametrize("form", ["lists", "npy"])
def test_the_last_token_may_be_absent(tmp_path, truth, form):
    acts = read(tmp_path, dumps.vllm_responses(truth, form=form, last=False))
    assert same(acts, cut_last(truth), weights=False)
    assert found(acts) == {"last_token_absent": 3}


@pytest.mark.parametrize("form", ["lists", "npy"])
def test_other_row_counts_are_refused(tmp_path, truth, form):
    objects = dumps.vllm_responses(truth, form=form)
    objects[1]["choices"][0]["token_ids"] += [1, 2]
    with pytest.raises(DataError, match=r"line 2 choice 0 has routing up to token 4 of 6, expecte"):
        read(tmp_path, objects)
    objects = dumps.vllm_responses(truth)
    objects[2]["prompt_routed_experts"].pop()
    with pytest.raises(DataError, match=r"line 3 choice 0 has 2 rows for 3 prompt tokens"):
        read(tmp_path, objects)


def test_cached_prefixes_and_preempted_answers(tmp_path, truth):
    objects = dumps.vllm_responses(truth)
    objects[0]["prompt_routed_experts"][:2] = np.full((2, 3, 3), -1).tolist()
    objects[1]["choices"][0]["routed_experts"] = objects[1]["prompt_routed_experts"] = None
    objects[2]["choices"][0]["routed_experts"] = None
    acts = read(tmp_path, objects)
    assert found(acts) == {"missing_tokens": 2, "samples_without_routing": 1}
    assert acts.samples()["n_tokens"].to_list() == [3, 3]
    assert acts.tokens()["position"].to_list() == [2, 3, 4, 0, 1, 2]


def test_prefill_only(tmp_path, truth):
    acts = read(tmp_path, dumps.vllm_responses(truth, form="npy"), prefill_only=True)
    assert acts.samples()["n_tokens"].to_list() == [3, 3, 3]
    assert found(acts) == {"generated_tokens": 7}
    bare = [{"choices": [{"routed_experts": truth.ids[:5].tolist()}]}]
    assert read(tmp_path, bare).n_tokens == 5
    with pytest.raises(SettingsError, match="does not say which tokens it wrote"):
        read(tmp_path, bare, prefill_only=True)


@pytest.mark.parametrize("form", ["lists", "npy"])
def test_a_prompt_with_several_answers_counts_once(tmp_path, truth, form):
    one, two = dumps.vllm_responses(dumps.make_truth((5, 5)), form=form)
    one["choices"] += two["choices"]
    acts = read(tmp_path, [one])
    assert acts.samples()["n_tokens"].to_list() == [5, 2]
    assert acts.tokens()["position"].to_list() == [0, 1, 2, 3, 4, 3, 4]
    assert found(acts) == {"shared_prompts": 1}


def test_rows_that_begin_later(tmp_path, truth):
    objects = dumps.vllm_responses(truth, form="described")
    about = objects[0]["choices"][0]["routed_experts"]
    rows = truth.ids[2:5].astype("<i2")
    about |= {"data": base64.b64encode(rows.tobytes()).decode(), "shape": [3, 3, 3], "start": 2}
    acts = read(tmp_path, objects[:1])
    assert acts.tokens()["position"].to_list() == [2, 3, 4]
    assert acts.tokens()["token_id"].to_list() == truth.token_ids[2:5].tolist()
    about["start"] = 5
    with pytest.raises(DataError, match="has routing up to token 8 of 5"):
        read(tmp_path, objects[:1])


def test_domains_may_be_written_into_responses(tmp_path, truth):
    objects = dumps.vllm_responses(truth)
    objects[0]["domain"] = "law"
    assert read(tmp_path, objects).domains == ("law", "text")
    assert read(tmp_path, objects, domain="all").domains == ("all",)


def test_one_response_or_a_list_in_a_file(tmp_path, truth):
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(dumps.vllm_responses(truth)))
    acts = mc.import_routing("vllm", path, out=tmp_path / "a", experts=8, layers=(1, 2, 4))
    assert same(acts, truth, weights=False)
    path.write_text(json.dumps(dumps.vllm_responses(truth)[0]))
    acts = mc.import_routing("vllm", path, out=tmp_path / "b", experts=8, layers=(1, 2, 4))
    assert acts.n_tokens == 5


def test_without_weights_nothing_is_said_about_weights(tmp_path, truth):
    acts = read(tmp_path, dumps.vllm_responses(truth))
    assert not acts.has_weights
    for name in ("gate_sum", "esft_gate"):
        with pytest.raises(MissingInputError, match=r"needs routing weights, .* expert ids alone"):
            mc.score(name, acts)
    assert mc.score("frequency", acts).values.sum() == truth.ids.size


NAN = [[[float("nan"), 1, 2]] * 3] * 4
BROKEN = {
    "not JSON": ('{"choices": [', r"line 1 is not valid JSON; it may be truncated"),
    "no object": ("[1]", "holds list, expected an object"),
    "no choices": ("{}", "has no choices; give responses of a vLLM server"),
    "choices": ('{"choices": 3}', "holds int, expected a list"),
    "nan": (json.dumps({"choices": [{"routed_experts": NAN}]}), "holds float64 where whole"),
    "ragged": ('{"choices": [{"routed_experts": [[[1, 2]], [[1]]]}]}', "rows of different lengths"),
    "null": ('{"choices": [{"routed_experts": [[[1, null]]]}]}', "holds object where whole"),
    "axes": ('{"choices": [{"routed_experts": [[1, 2]]}]}', r"ids of shape \(1, 2\), expected"),
    "base64": ('{"choices": [{"routed_experts": "?"}]}', "is not base64; it may be truncated"),
    "npy": ('{"choices": [{"routed_experts": "k05VTVBZAQ=="}]}', "is a truncated or damaged array"),
    "dtype": ('{"choices": [{"routed_experts": {"data": "", "dtype": "O"}}]}', "its dtype 'O' is"),
    "counts": ('{"usage": {"prompt_tokens": -1}, "choices": [{}]}', "holds -1 where a count"),
    "tokens": ('{"prompt_token_ids": [-1], "choices": [{}]}', "not a list of uint32"),
    "nothing": ('{"choices": [{}]}', r"files hold no routing \(samples without routing 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_responses_get_one_sentence(tmp_path, name):
    text, message = BROKEN[name]
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        mc.import_routing("vllm", tmp_path / "r.jsonl", out=tmp_path / "acts", experts=8)
    assert not (tmp_path / "acts").exists()


def test_an_array_of_objects_in_base64_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "t.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    data = base64.b64encode(path.read_bytes()).decode()
    with pytest.raises(DataError, match="is a truncated or damaged array"):
        read(tmp_path, [{"choices": [{"routed_experts": data}]}])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("native", [True, False])
def test_sglang_round_trip(tmp_path, truth, native):
    objects = dumps.sglang_responses(truth, native=native)
    acts = read(tmp_path, objects, "sglang-response", **SHAPE)
    assert same(acts, cut_last(truth), weights=False, tokens=False)
    assert found(acts) == {"last_token_absent": 3}
    short = read(tmp_path, objects, "sglang-response", prefill_only=True, **SHAPE)
    assert short.samples()["n_tokens"].to_list() == [3, 3, 3]


def test_sglang_counts_dense_layers(tmp_path, truth):
    wide = np.concatenate([np.zeros_like(truth.ids[:, :1]), truth.ids], axis=1)
    objects = dumps.sglang_responses(dumps.Truth(wide, truth.weights, truth.token_ids, (5, 4, 7)))
    acts = read(tmp_path, objects, "sglang-response", layers=(0, 1, 2, 4), top_k=3)
    assert same(acts, cut_last(truth), weights=False, tokens=False)
    assert found(acts) == {"last_token_absent": 3, "dense_layers": 1}


def test_sglang_shapes_must_fit_the_tokens(tmp_path, truth):
    objects = dumps.sglang_responses(truth)
    with pytest.raises(DataError, match="ids without their shape; say --layers"):
        read(tmp_path, objects, "sglang-response")
    with pytest.raises(ShapeError, match=r"144 bytes of ids, which is not int32 for 2 layers × 3"):
        read(tmp_path, objects, "sglang-response", layers=(1, 2), top_k=3)
    fused = dumps.make_truth((5,), n_experts=9)
    fused.ids[:, :, 2] = 8
    fused.ids[:, :, :2] = (0, 1)
    with pytest.raises(DataError, match=r"expert id 8, but ids are in .* fused shared experts"):
        read(tmp_path, dumps.sglang_responses(fused), "sglang-response", **SHAPE)
    with pytest.raises(SchemaError, match="neither choices nor meta_info"):
        read(tmp_path, [{}], "sglang-response")
