"""Ranked lists for engines that prune on load."""

import json

import numpy as np
import pytest

import moecollab as mc
from moecollab.criteria.scores import Scores
from moecollab.errors import DataError, OutputExistsError
from moecollab.pruning.exporting import load_ranking
from test_cli import inside  # noqa: F401 (a fixture)


def scores_of(values):
    values = np.array(values, dtype=np.float64)
    counts = np.ones(values.shape, dtype=np.int64)
    layers = tuple(range(1, 1 + len(values)))
    return Scores(criterion="reap", values=values, counts=counts, layers=layers, top_k=1)


SCORES = [[0.1, 0.9, 0.9, 0.3], [4.0, 3.0, 2.0, 1.0]]


def test_scores_rank_best_first_and_equal_ones_by_id(tmp_path):
    mc.export_ranking(scores_of(SCORES), tmp_path / "r.jsonl")
    text = (tmp_path / "r.jsonl").read_text()
    assert text == '{"1": [1, 2, 3, 0]}\n{"2": [0, 1, 2, 3]}\n'
    assert load_ranking(tmp_path / "r.jsonl") == {1: (1, 2, 3, 0), 2: (0, 1, 2, 3)}
    with pytest.raises(OutputExistsError):
        mc.export_ranking(scores_of(SCORES), tmp_path / "r.jsonl")


def test_a_plan_puts_those_that_stay_first(tmp_path):
    plan = mc.plan(scores_of(SCORES), drop=0.5, keep={1: [0]})
    assert plan.keep == {1: (0, 1), 2: (0, 1)}
    found = mc.export_ranking(plan, tmp_path / "r.jsonl")
    assert found == {1: (1, 0, 2, 3), 2: (0, 1, 2, 3)}
    for layer, kept in plan.keep.items():
        assert sorted(found[layer][: len(kept)]) == list(kept)


def test_command_takes_scores_and_plans(inside, tmp_path):  # noqa: F811
    scores = scores_of(SCORES)
    scores.save(tmp_path / "s.parquet")
    mc.plan(scores, drop=0.25, out=tmp_path / "p.json")
    for name in ("s.parquet", "p.json"):
        code, shown, _ = inside("export", name, "--out", f"{name}.jsonl")
        assert (code, shown) == (0, f"{name}.jsonl: 4 experts of each of 2 layers, best first\n")
        assert load_ranking(tmp_path / f"{name}.jsonl")[2] == (0, 1, 2, 3)


DAMAGED = (
    *('{"1": [0, 0]}', '{"1": 3}', "[1]", "{", '{"1": [0], "2": [0]}', '{"a": [1]}'),
    *('{"1": "12"}', '{"1": [1.5]}', '{"1": [true]}', '{"1": [-1]}'),
)


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_lines(line, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"0": [1, 0]}) + "\n" + line + "\n")
    with pytest.raises(DataError, match="line 2 of"):
        load_ranking(tmp_path / "r.jsonl")
