"""HSDL under squared error: the objective, scikit-learn's optimum, scales, new rows."""

import numpy as np
import pytest

from moecollab.patterns.dictionary import HSDL
from planted import as_rows, dense_codes, found_share, planted


@pytest.fixture(scope="module")
def x():
    return planted(n_rows=600, noise=0.01, seed=2)


@pytest.fixture(scope="module")
def collab(x):
    return HSDL(atoms=(30, 40), loss="l2", reconstruction=100.0, threads=1).fit(as_rows(x[0]))


def test_groups_are_found_and_strengths_reach_one(x, collab):
    assert found_share(collab.levels[0].atoms, x[1]) >= 0.8
    for level in collab.levels:
        live = level.peak > 0
        assert level.atoms[live].max(axis=1) == pytest.approx(1)
        assert (level.atoms >= 0).all()
        assert (np.diff(level.usage) <= 0).all()


def test_objective_is_the_formula_on_atoms_of_norm_one(x, collab):
    first, second = collab.levels
    length = np.linalg.norm(first.atoms.astype(float), axis=1)
    codes = dense_codes(collab.codes, 30).astype(float)
    own = codes * length
    size, sparsity = own.max(axis=0).sum(), own.sum() / 600
    error = 0.5 * ((x[0] - codes @ first.atoms) ** 2).sum() / 600
    scale = np.linalg.norm(second.atoms.astype(float), axis=1)
    unit = first.atoms / np.where(length > 0, length, 1)[:, None]
    links = second.links / np.where(length > 0, length, 1)[:, None] * scale
    use = own.sum(axis=0) / 600
    size += links.max(axis=0).sum()
    sparsity += use @ links.sum(axis=1)
    rest = unit - links @ (second.atoms / np.where(scale > 0, scale, 1)[:, None])
    error += use @ (0.5 * rest**2).sum(axis=1)
    last = collab.history[-1]
    names = ("dictionary_size", "sparsity", "reconstruction", "total")
    total = size + 10.0 * sparsity + 100.0 * error
    expected = (size, sparsity, error, total)
    assert [last[name] for name in names] == pytest.approx(expected, rel=1e-3)
    assert collab.settings["sparsity"] == 10.0


def test_new_rows_reach_the_optimum_of_scikit_learn(x):
    decomposition = pytest.importorskip("sklearn.decomposition")
    fit = HSDL(atoms=(30,), loss="l2", dictionary_size=0.0, threads=1).fit(as_rows(x[0]))
    level, ratio = fit.levels[0], 0.1
    length = np.linalg.norm(level.atoms.astype(float), axis=1)
    live = length > 0
    unit = level.atoms[live] / length[live, None]
    new = planted(n_rows=50, noise=0.01, seed=2)[0].astype(float)
    own = dense_codes(fit.transform(as_rows(new.astype(np.float32))), 30)[:, live] * length[live]
    best = decomposition.sparse_encode(
        new, unit, algorithm="lasso_cd", alpha=ratio, positive=True, max_iter=10_000
    )

    def cost(r):
        return ratio * r.sum() + 0.5 * ((new - r @ unit) ** 2).sum()

    capped = np.minimum(best, level.peak[live] * length[live])
    assert cost(own) <= cost(capped) * (1 + 1e-5)
    assert cost(own) >= cost(best) * (1 - 1e-5)
