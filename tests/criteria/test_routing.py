"""Criteria that read the router, on a table computed by hand."""

import numpy as np
import pytest
from synthetic import Recorded

from moecollab.criteria.scoring import score
from moecollab.pruning.planning import plan


@pytest.fixture(scope="module")
def table():
    """Two layers, three tokens, top 2 of 3 experts; one slot of layer 3 is unused."""
    return Recorded(
        expert=np.array([[[0, 1], [0, 2], [1, 0]], [[2, 1], [2, 0], [2, 1]]], dtype=np.uint16),
        weight=np.array(
            [[[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]], [[1, 0], [0.5, 0.25], [2, 1]]],
            dtype=np.float32,
        ),
        norm=np.array([[[2, 4], [6, 8], [1, 3]], [[1, 9], [2, 4], [3, 5]]], dtype=np.float32),
        sample=np.array([0, 0, 1]),
        n_experts=3,
    )


@pytest.fixture(scope="module")
def small(table, tmp_path_factory):
    return table.save(tmp_path_factory.mktemp("small") / "a")


def test_frequency_counts_tokens(small):
    assert score("frequency", small).values.tolist() == [[3, 2, 1], [1, 1, 3]]


def test_gate_sum_adds_weights(small):
    found = score("gate_sum", small)
    assert found.values.tolist() == [[1.625, 0.875, 0.5], [0.25, 1, 3.5]]


def test_gate_mean_divides_weights_by_tokens(small):
    expected = [[1.625 / 3, 0.875 / 2, 0.5], [0.25, 1, 3.5 / 3]]
    np.testing.assert_allclose(score("gate_mean", small).values, expected, rtol=1e-12)


def test_soft_routing_adds_probabilities_of_all_tokens(table, tmp_path):
    probability = np.array([[[0.5, 0.25, 0.25], [0.5, 0, 0.5], [0, 1, 0]]] * 2)
    found = score("soft_routing", table.changed(probability=probability).save(tmp_path / "a"))
    assert found.values.tolist() == [[1, 1.25, 0.75]] * 2


def test_esft_divides_by_choices_and_tokens(small):
    token = score("esft_token", small).values
    np.testing.assert_allclose(token, [[3 / 6, 2 / 6, 1 / 6], [1 / 5, 1 / 5, 3 / 5]])
    gate = score("esft_gate", small).values
    np.testing.assert_allclose(gate[0], np.array([1.625, 0.875, 0.5]) / 3)
    np.testing.assert_allclose(gate[1], np.array([0.25, 1, 3.5]) / 2.5)


def test_esft_token_adds_up_to_one_per_layer(acts):
    np.testing.assert_allclose(score("esft_token", acts).values.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize(("name", "like"), [("esft_token", "frequency"), ("esft_gate", "gate_sum")])
def test_esft_drops_what_its_sum_drops(acts, name, like):
    for per in ("layer", "model"):
        one, other = (plan(score(by, acts), drop=0.5, per=per) for by in (name, like))
        assert one.keep == other.keep


def test_random_depends_on_the_seed_alone(small):
    first, same, other = (score("random", small, seed=seed).values for seed in (1, 1, 2))
    assert (first == same).all()
    assert (first != other).all()
    assert (first >= 0).all()
    assert (first < 1).all()
