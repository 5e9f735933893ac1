"""Block steps of fits that never hold all rows, against slow twins."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from moecollab import _core
from moecollab.errors import DataError, ShapeError
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.passes import Descent, Pass
from moecollab.patterns.steps import (
    Task,
    enter,
    follow,
    full_scale,
    leave,
    steps_of,
    weighted_median,
)
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


LOSSES = pytest.mark.parametrize("loss", ["l1", "l2"])


def levels_of(loss, n_levels=3):
    """A fit of some levels, in its solver's scale, with the steps of its loss."""
    x = as_rows(planted(n_rows=300, noise=0.05, seed=1)[0])
    atoms = (12, 16, 10)[:n_levels]
    found = HSDL(atoms=atoms, loss=loss, reconstruction=80.0, sparsity=5.0, threads=1).fit(x)
    steps = steps_of(found.settings, 1)
    return found, steps, enter(found.levels, 300, steps)


@LOSSES
def test_the_way_into_the_solvers_scale_and_back_changes_nothing(loss):
    found, steps, levels = levels_of(loss)
    back = leave(levels, 300)
    for one, two in zip(found.levels, back, strict=True):
        for name in ("atoms", "usage", "peak"):
            assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-5, abs=1e-7)
    for stage in levels.stages:
        assert steps.length(stage.atoms[stage.caps > 0]) == pytest.approx(1, abs=1e-5)


@LOSSES
def test_full_scale_keeps_products_and_caps(loss):
    _, steps, levels = levels_of(loss)
    first = levels.stages[0]
    factor = np.linspace(0.2, 1, 12)
    small = replace(first, atoms=(first.atoms * factor[:, None]).astype(np.float32))
    scaled, found = full_scale(replace(small, caps=first.caps / factor), steps)
    live = first.caps > 0
    assert found[live] == pytest.approx(factor[live], rel=1e-5)
    assert scaled.atoms == pytest.approx(first.atoms, abs=1e-6)
    assert scaled.caps[live] == pytest.approx(first.caps[live], rel=1e-5)


@LOSSES
def test_use_and_caps_follow_the_scale_of_moved_atoms(loss):
    """Halved atoms come back at full scale, with half the use and half the caps."""
    _, steps, levels = levels_of(loss, n_levels=1)
    half = replace(levels.stages[0], atoms=levels.stages[0].atoms / 2)
    moved = SimpleNamespace(
        settings=steps.settings, length=steps.length, move=lambda *_: half.atoms
    )
    descent = Descent(moved, None, "x")
    found = descent._next(Pass(levels, {}, None, {}))
    live = levels.stages[0].caps > 0
    assert found.use[live] == pytest.approx(levels.use[live] / 2, rel=1e-5)
    assert found.stages[0].caps[live] == pytest.approx(levels.stages[0].caps[live] / 2, rel=1e-5)


def test_finer_levels_follow_until_nothing_is_gained():
    """More steps than one, weighted by use: heavy atoms end closer than light ones."""
    _, steps, levels = levels_of("l2", n_levels=2)
    stage, rng = levels.stages[1], np.random.default_rng(0)
    above = levels.stages[0].atoms * rng.uniform(0.3, 1, levels.stages[0].atoms.shape)
    above = above.astype(np.float32)
    weight = np.where(np.arange(12) % 2, 10.0, 0.01)
    task = Task(above, weight)
    once = steps_of(dict(steps.settings) | {"max_iterations": 1}, 1)
    made = [stage, follow(stage, task, once), follow(stage, task, steps)]
    costs = [task.cost(each, steps) for each in made]
    assert costs[2] < costs[1] < costs[0]
    done = made[2]
    heavy = follow(stage, Task(above, np.full(12, 1.0)), steps)
    rest = [steps.errors(above - made.links @ made.atoms) for made in (done, heavy)]
    assert rest[0][1::2].sum() < rest[1][1::2].sum()


def test_a_level_below_pulls_at_the_one_above_it():
    _, steps, levels = levels_of("l2")
    second, third = levels.stages[1:]
    weight = levels.use
    below = replace(third, atoms=np.roll(third.atoms, 7, axis=1))
    free = follow(second, Task(levels.stages[0].atoms, weight), steps)
    pulled = follow(second, Task(levels.stages[0].atoms, weight, below), steps)
    goal = below.links @ below.atoms
    use = second.links.sum(axis=0)
    distance = [(use * np.square(goal - made.atoms).sum(axis=1)).sum() for made in (free, pulled)]
    assert distance[1] < distance[0]


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
