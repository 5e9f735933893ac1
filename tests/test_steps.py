"""Block steps of fits that never hold all rows, against slow twins."""

from itertools import pairwise

import numpy as np
import pytest

from moecollab import _core
from moecollab.errors import DataError, ShapeError
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.steps import weighted_median
from planted import as_rows, planted
from reference import best_entry


def arrays(dense):
    rows = as_rows(np.asarray(dense, np.float32))
    return rows.indptr, rows.sites, rows.values


@pytest.fixture
def problem():
    """Rows (40, 7), atoms (3, 7) and codes (40, 3)."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 4, (40, 3)) * 0.5
    atoms = rng.integers(0, 5, (3, 7)) / 4
    x = codes @ atoms + (rng.random((40, 7)) < 0.3) * rng.random((40, 7))
    return x.astype(np.float32), atoms.astype(np.float32), codes.astype(np.float32)


def test_atoms_move_to_weighted_medians_one_after_the_other(problem):
    x, atoms, codes = problem
    start = np.full_like(atoms, 0.5)
    moved = start
    for _ in range(30):
        moved = _core.step_atoms(arrays(x), np.full(40, 1 / 40), moved, arrays(codes), 1)
    for site in range(7):
        for atom in range(3):
            entries = moved[:, site].astype(float)
            entries[atom] = best_entry(x[:, site], codes, entries, atom)
            best = np.abs(x[:, site] - codes @ entries).sum()
            assert np.abs(x[:, site] - codes @ moved[:, site]).sum() <= best + 1e-4
    assert np.abs(x - codes @ moved).sum() < np.abs(x - codes @ start).sum()


def test_a_row_twice_as_heavy_is_a_row_twice(problem):
    x, atoms, codes = problem
    weight = np.ones(40)
    weight[:10] = 2
    twice = np.concatenate([x, x[:10]]), np.concatenate([codes, codes[:10]])
    heavy = _core.step_atoms(arrays(x), weight, atoms, arrays(codes), 1)
    double = _core.step_atoms(arrays(twice[0]), np.ones(50), atoms, arrays(twice[1]), 1)
    assert heavy == pytest.approx(double, abs=1e-6)
    sums = _core.sum_square(arrays(x), weight, atoms, arrays(codes), 1)
    both = _core.sum_square(arrays(twice[0]), np.ones(50), atoms, arrays(twice[1]), 1)
    for name in ("second", "pull", "cost"):
        assert sums[name] == pytest.approx(both[name], rel=1e-5, abs=1e-5)


def test_square_sums_are_the_formulas_and_add_up(problem):
    x, atoms, codes = problem
    weight = np.linspace(0.1, 1, 40)
    whole = _core.sum_square(arrays(x), weight, atoms, arrays(codes), 1)
    rest, heavy = x - codes @ atoms, codes * weight[:, None]
    assert whole["second"] == pytest.approx(heavy.T @ codes, rel=1e-5)
    assert whole["pull"] == pytest.approx(heavy.T @ rest, rel=1e-4, abs=1e-5)
    cost = (heavy.sum(), 0.5 * (weight * (rest**2).sum(axis=1)).sum())
    assert whole["cost"] == pytest.approx(cost, rel=1e-5)
    parts = [
        _core.sum_square(arrays(x[part]), weight[part], atoms, arrays(codes[part]), 2)
        for part in (slice(0, 11), slice(11, 40))
    ]
    for name in ("second", "pull", "cost"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], rel=1e-5, abs=1e-5)


def test_square_steps_are_projected_coordinate_descent(problem):
    x, atoms, codes = problem
    start = (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).astype(np.float32)
    sums = _core.sum_square(arrays(x), np.ones(40), start, arrays(codes), 1)
    moved = _core.step_square(start, sums["second"], sums["pull"], 3, 1)
    second, product = codes.T @ codes.astype(float), codes.T @ x.astype(float)
    twin = start.astype(float)
    for atom in 3 * [0, 1, 2]:
        step = (product[atom] - second[atom] @ twin) / second[atom, atom]
        free = np.maximum(twin[atom] + step, 0)
        twin[atom] = free / max(1.0, np.linalg.norm(free))
    assert moved == pytest.approx(twin, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_median_has_the_least_absolute_error(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (6, 2, 3)).astype(np.float32)
    weight, old = rng.integers(0, 3, (6, 2)).astype(float), np.full((2, 3), 9, np.float32)
    found = weighted_median(values, weight, old)
    for atom, site in np.ndindex(2, 3):
        cost = [weight[:, atom] @ np.abs(values[:, atom, site] - v) for v in range(4)]
        if weight[:, atom].any():
            own = weight[:, atom] @ np.abs(values[:, atom, site] - found[atom, site])
            assert own == min(cost)
            assert found[atom, site] == np.flatnonzero(np.isclose(cost, min(cost))).max()
        else:
            assert found[atom, site] == 9


def test_levels_that_move_together_gain():
    x = as_rows(planted(n_rows=600, noise=0.05, seed=2)[0])
    found = HSDL(atoms=(20, 30), loss="l2", reconstruction=100.0, threads=1).fit(x)
    joint = [row["total"] for row in found.history if row["stage"] == "joint"]
    before = [row for row in found.history if row["stage"].startswith("level")]
    apart = before[-1]["total"] + [r for r in before if r["stage"] == "level 1"][-1]["total"]
    assert len(joint) > 1
    assert all(one > two for one, two in pairwise(joint))
    assert found.objective == joint[-1] < apart


def test_what_does_not_fit_is_refused(problem):
    x, atoms, codes = problem
    weight = np.ones(40)
    with pytest.raises(DataError, match="weight has length 39"):
        _core.step_atoms(arrays(x), weight[1:], atoms, arrays(codes), 1)
    with pytest.raises(DataError, match="codes has length 39"):
        _core.sum_square(arrays(x), weight, atoms, arrays(codes[1:]), 1)
    with pytest.raises(DataError, match="weight holds NaN"):
        _core.sum_square(arrays(x), np.full(40, np.nan), atoms, arrays(codes), 1)
    with pytest.raises(DataError, match="second has length 4"):
        _core.step_square(atoms, np.ones((2, 2), np.float32), atoms, 1, 1)
    with pytest.raises(DataError, match="pull holds inf"):
        _core.step_square(atoms, np.ones((3, 3), np.float32), np.full_like(atoms, np.inf), 1, 1)
    with pytest.raises(ShapeError, match="atoms is float64"):
        _core.step_square(atoms.astype(float), np.ones((3, 3), np.float32), atoms, 1, 1)
    start = (atoms, np.ones(2, np.float32))
    settings = {
        "atoms": [3],
        "copies": False,
        "dictionary_size": 1.0,
        "sparsity": 1.0,
        "reconstruction": 9.0,
    }
    settings |= {"max_iterations": 5, "tolerance": 1e-3, "seed": 0, "threads": 1}
    with pytest.raises(DataError, match="atoms has length"):
        _core.fit_dictionary(arrays(x), 7, settings, print, start)
    ones = np.ones(3, np.float32)
    with pytest.raises(DataError, match="start has length 3, expected 2"):
        _core.fit_dictionary(arrays(x), 7, settings | {"atoms": [2]}, print, (atoms, ones))
