"""Damaged files of every kind: one of our errors or a sound recording, never anything else."""

import os
import warnings

import numpy as np
import pytest

import dumps
import moecollab as mc
from moecollab.errors import MoeCollabError
from moecollab.record.imports.kinds import READERS, SUFFIXES

N_CASES = int(os.environ.get("MOECOLLAB_DAMAGE_CASES", "40"))
TRUTH = dumps.make_truth()
NORMS = np.ones(TRUTH.ids.shape)
MAKERS = {
    "npz": lambda at: dumps.write_npz(at / "a.npz", TRUTH),
    "parquet": lambda at: dumps.write_parquet(at / "a.parquet", TRUTH),
    "esft": lambda at: dumps.write_esft(at / "law", TRUTH) / "expert_weights_2.txt",
    "vllm": lambda at: dumps.write_jsonl(at / "a.jsonl", dumps.vllm_responses(TRUTH)),
    "sglang": lambda at: dumps.write_pt(at / "a.pt", dumps.sglang_recording(TRUTH)),
    "sglang-response": lambda at: dumps.write_jsonl(at / "a.jsonl", dumps.sglang_responses(TRUTH)),
    "megatron": lambda at: dumps.write_jsonl(at / "a.jsonl", dumps.megatron_trace(TRUTH)),
    "llamacpp": lambda at: dumps.write_jsonl(at / "a.jsonl", [dumps.llamacpp_json(TRUTH, NORMS)]),
    "reap": lambda at: dumps.write_pt(at / "a.pt", dumps.reap_observations(TRUTH, NORMS)),
}


def test_every_kind_is_damaged():
    assert set(MAKERS) == set(READERS) == set(SUFFIXES)


def damaged(data, rng):
    """Bytes cut short, changed here and there, left out or put in twice."""
    how, at = rng.integers(4), int(rng.integers(len(data)))
    if how == 0:
        return data[:at]
    if how == 1:
        changed = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            changed[place] = rng.integers(256)
        return bytes(changed)
    length = int(rng.integers(1, 40))
    if how == 2:
        return data[:at] + data[at + length :]
    return data[:at] + data[at : at + length] + data[at:]


def check_recording(found):
    """Whether what was imported keeps its own rules."""
    if isinstance(found, mc.RoutingCounts):
        assert (mc.load_counts(found.path).tallies().count >= 0).all()
        return
    again = mc.load_activations(found.path)
    for layer in again.layers:
        table = again.layer(layer)
        assert (table.expert < again.n_experts).all()
        assert np.isfinite(table.weight).all()
        assert (table.weight[:, 0] > 0).all()
        assert (np.diff(table.weight, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_damage(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    whole, sentences = path.read_bytes(), []
    options = {"experts": 8, "top_k": 3, "overwrite": True}
    if kind == "sglang-response":
        options["layers"] = TRUTH.layers
    files = path.parent if kind == "esft" else path
    for case in range(N_CASES):
        path.write_bytes(damaged(whole, np.random.default_rng(case)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                check_recording(mc.import_routing(kind, files, out=tmp_path / "out", **options))
            except MoeCollabError as error:
                sentences.append(str(error))
    assert len(sentences) > N_CASES // 10
    assert all("\n" not in text and len(text) < 600 for text in sentences)
