"""Intervals and paired comparison, on numbers made for it."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecollab.errors import DataError, MissingInputError, SettingsError
from moecollab.evaluation import intervals
from moecollab.evaluation.differences import SCHEMA, differences
from moecollab.evaluation.evaluation import Evaluation
from moecollab.evaluation.intervals import paired_interval, ratio_interval, resampled_sums
from moecollab.evaluation.tasks import TaskResult

DOMAINS = ["law"] * 20 + ["maths"] * 30


def make(shift=0.0, noise=0.0, *, name="m", seed=0, tasks=(), **changes):
    """Fifty documents whose loss differs widely; `shift` is added per token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, 50)
    per_token = rng.uniform(1, 6, 50) + shift + noise * np.random.default_rng(1).normal(size=50)
    documents = pl.DataFrame(
        {
            "document": [f"d{i}" for i in range(50)],
            "domain": DOMAINS,
            "tokens": tokens,
            "nll": per_token * tokens,
        }
    )
    about = {"inputs": {"corpus": "c0"}, "settings": {"context": 512}, "seed": seed}
    fields = {"documents": documents, "about": about} | changes
    return Evaluation(name=name, model="m", tasks=tuple(tasks), **fields)


def make_task(scored, metric="acc", questions="q0", **changes):
    fields = {"filter": "none", "higher_is_better": True, "n_original": 100, "stderr": 0.1}
    fields |= {"value": float(np.mean(scored)), "values": tuple(scored), "n": len(scored)}
    return TaskResult(task="five", metric=metric, questions=questions, **(fields | changes))


def row(table, **where):
    found = table.filter(**where)
    assert found.height == 1
    return found.row(0, named=True)


def test_resampling_equals_the_slow_twin():
    columns = np.random.default_rng(5).normal(size=(7, 2))
    found = resampled_sums(columns, seed=3, resamples=11)
    rng = np.random.default_rng(3)
    for draw in rng.integers(0, 7, (11, 7)):
        expected = [sum(columns[i, column] for i in draw) for column in range(2)]
        np.testing.assert_allclose(found[0], expected, rtol=1e-12)
        found = found[1:]


def test_resampling_in_pieces_gives_the_same(monkeypatch):
    columns = np.random.default_rng(5).normal(size=(30, 2))
    whole = resampled_sums(columns, seed=0, resamples=100)
    monkeypatch.setattr(intervals, "_CHUNK", 210)
    np.testing.assert_array_equal(resampled_sums(columns, seed=0, resamples=100), whole)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        size = rng.integers(1, 20, 60).astype(np.float64)
        total = size * rng.normal(2.0, 1.0, 60)
        low, high = ratio_interval(total, size, seed=trial)
        hits += low <= 2.0 <= high
    assert 175 <= hits <= 199


@given(st.integers(2, 40), st.floats(0.1, 10), st.integers(0, 9))
def test_interval_of_a_constant_is_the_constant(n, value, seed):
    size = np.arange(1, n + 1, dtype=np.float64)
    low, high = ratio_interval(value * size, size, seed=seed)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)


def test_one_document_has_no_interval():
    one = np.ones(1)
    assert ratio_interval(one, one, seed=0) is None
    assert paired_interval(one, one, one, seed=0) is None


def test_paired_interval_is_much_narrower_than_an_unpaired_one():
    full, cut = make(), make(0.1, noise=0.01)
    nll = [e.documents["nll"].to_numpy() for e in (full, cut)]
    size = full.documents["tokens"].to_numpy().astype(np.float64)
    low, high = paired_interval(nll[1], nll[0], size, seed=0)
    alone = ratio_interval(nll[1], size, seed=0)
    assert low < 0.1 < high
    assert high - low < (alone.high - alone.low) / 20


def test_comparison_by_hand():
    documents = pl.DataFrame(
        {"document": ["a", "b"], "domain": ["x", "y"], "tokens": [1, 3], "nll": [2.0, 6.0]}
    )
    worse = documents.with_columns(nll=pl.Series([4.0, 6.0]))
    table = differences({"cut": make(documents=worse), "full": make(documents=documents)})
    assert table.schema == pl.Schema(SCHEMA)
    assert table["model"].to_list() == ["full"] * 3 + ["cut"] * 3
    assert table["domain"].to_list() == ["all", "x", "y"] * 2
    overall = row(table, model="cut", domain="all")
    assert (overall["value"], overall["difference"], overall["relative"]) == (2.5, 0.5, 0.25)
    # Draws are {a,a}, {a,b}, {b,b}: differences 2, 1/2 and 0.
    assert (overall["difference_low"], overall["difference_high"]) == (0.0, 2.0)
    single = row(table, model="cut", domain="x")
    assert (single["n"], single["value"], single["difference"]) == (1, 4.0, 2.0)
    assert single["low"] is single["difference_high"] is None
    assert row(table, model="full", domain="all")["difference"] == 0


def test_a_clear_cost_is_seen_and_its_sign_is_right():
    table = differences({"full": make(), "cut": make(0.1, noise=0.02)})
    for domain in ("all", "law", "maths"):
        found = row(table, model="cut", domain=domain)
        assert 0 < found["difference_low"] < found["difference"] < found["difference_high"]
        assert found["low"] < found["value"] < found["high"]
        assert found["higher_is_better"] is False
    assert row(table, model="cut", domain="law")["n"] == 20


def test_comparison_is_deterministic_and_uses_the_same_draws():
    evaluations = {"full": make(), "a": make(0.1, noise=0.02), "b": make(0.1, noise=0.02, seed=9)}
    table = differences(evaluations)
    assert table.equals(differences(evaluations))
    first, second = (table.filter(model=name).drop("model") for name in ("a", "b"))
    assert first.equals(second)


def test_tasks_are_paired_by_question():
    full = make_task([1.0, 1.0, 0.0, 1.0])
    cut = make_task([1.0, 0.0, 0.0, 1.0])
    table = differences({"full": make(tasks=[full]), "cut": make(tasks=[cut])})
    found = row(table, model="cut", measure="five")
    assert (found["value"], found["difference"], found["n"]) == (0.5, -0.25, 4)
    assert found["difference_low"] <= -0.25 <= found["difference_high"] == 0
    assert (found["metric"], found["higher_is_better"]) == ("acc", True)


def test_other_questions_are_not_subtracted():
    full = make_task([1.0, 0.0], questions="q0")
    cut = make_task([1.0, 1.0], questions="q1")
    table = differences({"full": make(tasks=[full]), "cut": make(tasks=[cut])})
    found = row(table, model="cut", measure="five")
    assert found["value"] == 1.0
    assert found["difference"] is None


def test_metrics_that_are_no_mean_keep_their_value():
    given = make_task([1.0], metric="f1", values=(), value=0.37, n=9, filter="strict")
    table = differences({"full": make(tasks=[given])})
    found = row(table, measure="five")
    assert (found["value"], found["low"], found["n"]) == (0.37, None, 9)
    assert found["metric"] == "f1 (strict)"


def test_a_measure_that_the_baseline_lacks_has_no_difference():
    table = differences({"full": make(documents=None, tasks=[make_task([1.0])]), "cut": make()})
    assert row(table, model="cut", domain="all")["difference"] is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make(about={"inputs": {"corpus": "c1"}, "settings": {"context": 512}}),
            "'cut' was measured with corpus c1 but the baseline with c0; evaluate both alike",
        ),
        (
            make(about={"inputs": {"corpus": "c0"}, "settings": {"context": 64}}),
            "'cut' was measured with context 64 but the baseline with 512",
        ),
        (make(documents=make().documents.head(9)), "have other documents or tokens"),
        (
            make(documents=make().documents.with_columns(tokens=pl.lit(5, pl.Int64))),
            "have other documents or tokens; evaluate both on the same",
        ),
    ],
)
def test_what_is_not_comparable_is_refused(other, message):
    with pytest.raises(DataError, match=message):
        differences({"full": make(), "cut": other})


def test_the_baseline_must_be_there():
    with pytest.raises(SettingsError, match=r"baseline is 'full'.* did you mean fulll"):
        differences({"fulll": make()})
    assert differences({"fulll": make()}, baseline="fulll").height == 3


def test_nothing_to_compare():
    with pytest.raises(MissingInputError, match="measured nothing"):
        differences({"full": make(documents=None)})
