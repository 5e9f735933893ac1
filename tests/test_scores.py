"""Scores: checks, file, damaged files."""

import json

import numpy as np
import polars as pl
import pytest

from moecollab.criteria.scores import Scores, load_scores
from moecollab.errors import DataError, OutputExistsError, SchemaError, ShapeError


def make(**changes):
    fields = {
        "criterion": "reap",
        "values": np.array([[0.1, 1 / 3, 2.0], [-1.0, 0.0, 1e-300]]),
        "counts": np.array([[1, 2, 3], [4, 5, 6]]),
        "layers": (1, 10),
        "top_k": 2,
        "activations": "0123456789abcdef",
        "settings": {"drop": 0.25, "seed": 0},
    }
    return Scores(**(fields | changes))


def test_shape_is_known():
    scores = make()
    assert (scores.n_layers, scores.n_experts, scores.n_sites) == (2, 3, 6)
    assert repr(scores) == "Scores(reap: 2 layers × 3 experts, -1 to 2)"
    assert not scores.values.flags.writeable


def test_file_round_trip(tmp_path):
    path = tmp_path / "scores.parquet"
    scores = make()
    scores.save(path)
    found = load_scores(path)
    assert found.values.tobytes() == scores.values.tobytes()
    assert (found.counts == scores.counts).all()
    for name in ("criterion", "layers", "top_k", "activations", "settings"):
        assert getattr(found, name) == getattr(scores, name)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="exists"):
        scores.save(path)
    found.save(path, overwrite=True)
    assert path.read_bytes() == before


def test_file_has_the_promised_columns(tmp_path):
    make().save(tmp_path / "scores.parquet")
    table = pl.read_parquet(tmp_path / "scores.parquet")
    assert dict(table.schema) == {
        "layer": pl.UInt32,
        "expert": pl.UInt16,
        "score": pl.Float64,
        "count": pl.Int64,
    }
    assert table.row(3) == (10, 0, -1.0, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": np.zeros((2, 3), np.float32)}, ShapeError, r"values of the scores is float32"),
        ({"values": np.zeros(6)}, ShapeError, r"expected float64 \(2, n_experts\)"),
        ({"values": np.zeros((2, 4))}, ShapeError, r"shape \(2, 4\) and counts \(2, 3\)"),
        ({"counts": np.zeros((2, 3))}, ShapeError, "counts of the scores is float64"),
        ({"layers": (1,)}, ShapeError, r"expected float64 \(1, n_experts\)"),
        ({"layers": (10, 1)}, DataError, r"layers \(10, 1\) are not ascending"),
        (
            {"values": np.array([[0, 0, 0], [0, np.inf, 0]])},
            DataError,
            "reap score of layer 10 expert 1 is inf",
        ),
    ],
)
def test_wrong_arrays(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_damaged_files(tmp_path):
    path = tmp_path / "scores.parquet"
    with pytest.raises(DataError, match="does not exist; make it with score"):
        load_scores(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_scores(path)
    make().save(path, overwrite=True)
    about = pl.read_parquet_metadata(path)["moecollab"]
    table = pl.read_parquet(path)

    def rewritten(table, about):
        table.write_parquet(path, metadata={"moecollab": about})
        return path

    with pytest.raises(SchemaError, match="is not a file of scores"):
        load_scores(rewritten(table.drop("count"), about))
    with pytest.raises(SchemaError, match="expected scores version 1"):
        load_scores(rewritten(table, "{}"))
    with pytest.raises(DataError, match="incomplete"):
        load_scores(rewritten(table.head(5), about))
    with pytest.raises(DataError, match="lacks or repeats experts"):
        load_scores(rewritten(table.reverse(), about))
    lacking = {key: value for key, value in json.loads(about).items() if key != "top_k"}
    with pytest.raises(DataError, match="incomplete"):
        load_scores(rewritten(table, json.dumps(lacking)))


def test_experts_that_were_never_routed_are_reported():
    scores = make(counts=np.array([[1, 0, 3], [0, 5, 6]]))
    assert scores.unrouted == ((1, 1), (10, 0))
    assert repr(scores) == "Scores(reap: 2 layers × 3 experts, -1 to 2; 2 never routed)"
    assert make(counts=np.zeros((2, 3), np.int64)).unrouted == ()


def test_scores_without_a_recording(tmp_path):
    scores = make(activations=None, counts=np.zeros((2, 3), np.int64))
    scores.save(tmp_path / "scores.parquet")
    assert load_scores(tmp_path / "scores.parquet").activations is None
