"""Files of SGLang's recorder, and that no pickle is run."""

import pickle

import numpy as np
import pytest
import torch

import dumps
import moecollab as mc
from moecollab.errors import DataError, MissingInputError, SchemaError, ShapeError
from test_imports import found


@pytest.fixture
def truth():
    return dumps.make_truth((5, 4, 7))


def read(tmp_path, value, **options):
    path = dumps.write_pt(tmp_path / "rank0.pt", value)
    return mc.import_routing("sglang", path, out=tmp_path / "acts", overwrite=True, **options)


def test_round_trip(tmp_path, truth):
    acts = read(tmp_path, dumps.sglang_recording(truth))
    assert (acts.layers, acts.n_experts, acts.top_k) == ((1, 2, 4), 8, 3)
    assert found(acts) == {"dense_layers": 2}
    # Three prompts, then the first decode pass, then one after each change of the batch.
    assert acts.samples()["n_tokens"].to_list() == [3, 3, 3, 1, 1, 1, 1, 1, 2]
    order = [0, 1, 2, 5, 6, 7, 9, 10, 11, 3, 8, 12, 4, 13, 14, 15]
    assert acts.tokens()["token_id"].to_list() == truth.token_ids[order].tolist()
    start = np.repeat([0, 5, 9], [5, 4, 7])
    assert acts.tokens()["position"].to_list() == (np.arange(16) - start)[order].tolist()
    for row, layer in enumerate(truth.layers):
        assert (acts.layer(layer).expert == truth.ids[order, row]).all()


def test_prefill_only(tmp_path, truth):
    acts = read(tmp_path, dumps.sglang_recording(truth), prefill_only=True)
    assert acts.samples()["n_tokens"].to_list() == [3, 3, 3]
    assert found(acts)["generated_tokens"] == 7


def test_decoding_of_one_request_is_one_sample(tmp_path):
    acts = read(tmp_path, dumps.sglang_recording(dumps.make_truth((9,))))
    assert acts.samples()["n_tokens"].to_list() == [3, 6]


def test_ranks_that_see_all_tokens_count_once(tmp_path, truth):
    for rank in range(2):
        dumps.write_pt(tmp_path / f"rank{rank}.pt", dumps.sglang_recording(truth))
    paths = [tmp_path / "rank0.pt", tmp_path / "rank1.pt"]
    acts = mc.import_routing("sglang", paths, out=tmp_path / "acts")
    assert acts.n_tokens == 16
    assert found(acts)["duplicate_files"] == 1


def test_other_passes_are_left_out(tmp_path, truth):
    recording = dumps.sglang_recording(truth)
    for record, mode in zip(recording["records"][1:3], (5, 4), strict=True):
        record["forward_mode"] = mode
    acts = read(tmp_path, recording)
    assert found(acts) == {"dense_layers": 2, "other_passes": 1}
    assert acts.n_tokens == 16 - 5


def test_physical_ids_need_a_map(tmp_path, truth):
    recording = dumps.sglang_recording(truth)
    mapping = recording["last_physical_to_logical_map"]
    for missing in ({}, {"last_physical_to_logical_map": None}):
        with pytest.raises(DataError, match=r"physical ids without a map to logical ones; record"):
            read(tmp_path, {"records": recording["records"]} | missing)
    with pytest.raises(DataError, match=r"record 0 holds expert \d+, but its map has 6 physical"):
        read(tmp_path, recording | {"last_physical_to_logical_map": mapping[:, :6]})
    with pytest.raises(ShapeError, match=r"map of shape \(12,\), expected"):
        read(tmp_path, recording | {"last_physical_to_logical_map": mapping[0]})
    with pytest.raises(ShapeError, match=r"shape \(5, 9, 8\), expected \(4, tokens, slots\)"):
        read(tmp_path, recording | {"last_physical_to_logical_map": mapping[:4]})


def test_records_of_another_kind(tmp_path, truth):
    recording = dumps.sglang_recording(truth)
    first = recording["records"][0]

    def with_first(**changes):
        return recording | {"records": [first | changes]}

    with pytest.raises(SchemaError, match="holds neither records nor logical_count"):
        read(tmp_path, {"weights": torch.ones(2)})
    with pytest.raises(SchemaError, match="neither records nor"):
        read(tmp_path, torch.ones(2))
    bare = {name: value for name, value in first.items() if name != "topk_ids_of_layer"}
    with pytest.raises(SchemaError, match="record 0 has no topk_ids_of_layer; use the recorder's"):
        read(tmp_path, recording | {"records": [bare]})
    with pytest.raises(SchemaError, match="has no list of records"):
        read(tmp_path, recording | {"records": 3})
    with pytest.raises(DataError, match=r"sequences of \[3, 3\] tokens, but 9 rows"):
        read(tmp_path, with_first(extend_seq_lens=[3, 3]))
    with pytest.raises(ShapeError, match="has 2 token ids for 9 rows"):
        read(tmp_path, with_first(input_ids=[1, 2]))
    with pytest.raises(DataError, match="not a list of uint32"):
        read(tmp_path, with_first(positions=[-1] * 9))
    with pytest.raises(ShapeError, match="topk_ids_of_layer of shape"):
        read(tmp_path, with_first(topk_ids_of_layer=first["topk_ids_of_layer"].float()))
    with pytest.raises(DataError, match="the files hold no routing"):
        read(tmp_path, recording | {"records": []})


def test_modes_are_not_mixed(tmp_path, truth):
    paths = [
        dumps.write_pt(tmp_path / "a.pt", dumps.sglang_recording(truth)),
        dumps.write_pt(tmp_path / "b.pt", dumps.sglang_statistics(truth)),
    ]
    with pytest.raises(SchemaError, match="some files are of mode stat, others hold records"):
        mc.import_routing("sglang", paths, out=tmp_path / "acts")


def test_statistics_become_counts(tmp_path, truth):
    counts = read(tmp_path, dumps.sglang_statistics(truth), top_k=3)
    assert isinstance(counts, mc.RoutingCounts)
    assert (counts.layers, counts.recorded) == ((1, 2, 4), ("count",))
    values = mc.score("frequency", counts).values
    assert (values == dumps.counts_of(truth)).all()
    for name, need in (("gate_sum", "routing weights"), ("reap", "output norms")):
        with pytest.raises(MissingInputError, match=need):
            mc.score(name, counts)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["sglang", "reap"])
@pytest.mark.parametrize("how", ["torch", "torch of old", "pickle"])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, kind, how):
    path, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    value = {"records": [Trap(sprung)], "last_physical_to_logical_map": torch.zeros(1, 1)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(value["records"]))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(
        DataError, match=r"trap.pt (holds objects that would have to be run|is trun)"
    ):
        mc.import_routing(kind, path, out=tmp_path / "acts", experts=8, top_k=2)
    assert not sprung.exists()
    assert not (tmp_path / "acts").exists()


def test_a_trap_springs_when_it_is_unpickled(tmp_path):
    """The test above can fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


def test_damaged_files_get_one_sentence(tmp_path, truth):
    whole = dumps.write_pt(tmp_path / "a.pt", dumps.sglang_recording(truth)).read_bytes()
    path = tmp_path / "b.pt"
    rng = np.random.default_rng(0)
    cuts = [whole[: len(whole) // 2], whole[:1], b"PK\x03\x04", b"\x80\x02}", rng.bytes(500), b"{}"]
    for data in cuts:
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"b.pt (is truncated or damaged|holds objects)"):
            mc.import_routing("sglang", path, out=tmp_path / "acts")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"b.pt is empty"):
        mc.import_routing("sglang", path, out=tmp_path / "acts")
