"""Criteria that read expert outputs, computed by hand."""

import numpy as np
import pytest
from synthetic import Recorded

from moecollab.criteria.base import Evidence
from moecollab.criteria.outputs import easy_ep_mixed
from moecollab.criteria.scoring import score
from moecollab.errors import MissingInputError


@pytest.fixture(scope="module")
def table():
    """One layer, three tokens (law, law, maths), top 2 of 3 experts with two output channels."""
    output = [[[3, 4], [0, -2]], [[6, 8], [1, 0]], [[0, 2], [0, 1]]]
    return Recorded(
        expert=np.array([[[0, 1], [0, 2], [1, 0]]], dtype=np.uint16),
        weight=np.array([[[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]]], dtype=np.float32),
        norm=np.array([[[5, 2], [10, 1], [2, 1]]], dtype=np.float32),
        output=np.array([output], dtype=np.float64),
        shift=np.array([[0.5, 1.0, 0.25]]),
        sample=np.array([0, 0, 1]),
        n_experts=3,
        layers=(4,),
    )


@pytest.fixture(scope="module")
def small(table, tmp_path_factory):
    return table.save(tmp_path_factory.mktemp("small") / "a")


ADDED = [0.75 * 5 + 0.5 * 10 + 0.375 * 1, 0.25 * 2 + 0.625 * 2, 0.5 * 1]
SHIFTED = [
    0.75 * 5 * 0.5 + 0.5 * 10 * 1 + 0.375 * 1 * 0.25,
    0.25 * 2 * 0.5 + 0.625 * 2 * 0.25,
    0.5 * 1 * 1,
]
BY_HAND = {
    "reap": [ADDED[0] / 3, ADDED[1] / 2, ADDED[2]],
    "reap_sum": ADDED,
    "ean_sum": [16, 4, 1],
    "ean_mean": [16 / 3, 2, 1],
    "msan": [(25 + 100 + 1) / 3, 4, 1],
    "max_activation": [8, 2, 1],
    "easy_ep": SHIFTED,
    # Expert 0 puts out (3, 4), (6, 8), (0, 1); expert 1 (0, -2), (0, 2); expert 2 (1, 0).
    "ean_channel": [45**0.5 + 9, 8**0.5, 1],
    "mean_output_norm": [(81 + 169) ** 0.5 / 3, 0, 1],
    # Variances over n: 6 and 74/9 for expert 0, 0 and 4 for expert 1.
    "eae": [
        0.5 * np.log(6 * 74 / 9),
        np.log(1e-12) + np.log(2),
        2 * np.log(1e-12),
    ],
    # Variances over n - 1: 9 and 37/3 for expert 0, 0 and 8 for expert 1.
    "mone": [1.625 * (9 + 37 / 3) ** 0.5, 0.875 * 8**0.5, 0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name, small):
    np.testing.assert_allclose(score(name, small).values, [BY_HAND[name]], rtol=1e-12)


def test_easy_ep_mixed_averages_shares_of_domains(small):
    law = np.array([0.75 * 5 * 0.5 + 0.5 * 10, 0.25 * 2 * 0.5, 0.5])
    maths = np.array([0.375 * 0.25, 0.625 * 2 * 0.25, 0])
    expected = (law / law.sum() + maths / maths.sum()) / 2
    np.testing.assert_allclose(score("easy_ep_mixed", small).values, [expected], rtol=1e-12)


def test_a_domain_without_tokens_adds_nothing(table, tmp_path):
    lonely = table.changed(domains=("law", "maths", "never")).save(tmp_path / "a")
    mixed, summed = (score(name, lonely).values for name in ("easy_ep_mixed", "easy_ep"))
    assert (mixed.sum(), np.isfinite(summed).all()) == (pytest.approx(2 / 3), True)


def test_easy_ep_is_the_reap_sum_where_every_shift_is_one(recorded, tmp_path):
    ones = recorded.changed(shift=np.ones_like(recorded.shift)).save(tmp_path / "a")
    assert (score("easy_ep", ones).values == score("reap_sum", ones).values).all()


def test_equal_outputs_have_no_spread(recorded, tmp_path):
    """Numbers whose sums do not cancel exactly in floating point."""
    same = np.broadcast_to(np.array([0.1, 1 / 3, 1e3]), recorded.output.shape)
    found = recorded.changed(output=same).save(tmp_path / "a")
    assert (score("mone", found).values == 0).all()
    np.testing.assert_allclose(score("eae", found).values, 3 * np.log(1e-12))


def test_shares_of_domains_need_domains(table):
    with pytest.raises(MissingInputError, match="sums by domain, which this evidence lacks"):
        easy_ep_mixed(Evidence(tallies=table.tallies().total(), top_k=2))
