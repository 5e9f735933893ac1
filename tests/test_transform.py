"""Codes of new rows: against a linear program, across blocks and threads, down the levels."""

import numpy as np
import pytest
from scipy.optimize import linprog

from moecollab.errors import DataError, SettingsError
from moecollab.patterns.codes import Codes
from moecollab.patterns.dictionary import HSDL
from planted import as_rows, dense_codes, planted


@pytest.fixture(scope="module")
def collab():
    x, _ = planted(n_rows=600, noise=0.01)
    return HSDL(atoms=(32, 48), sparsity=10.0, threads=1).fit(as_rows(x))


@pytest.fixture(scope="module")
def new():
    return planted(n_rows=120, noise=0.01, seed=0)[0][::-1].copy()


def program(row, atoms, peak, ratio):
    """The least of `ratio * sum r + |x - r D|_1` over `0 <= r <= peak`, by HiGHS."""
    n_atoms, n_sites = atoms.shape
    cost = np.concatenate([np.full(n_atoms, ratio), np.ones(n_sites)])
    slack = np.eye(n_sites)
    above = np.block([[-atoms.T, -slack], [atoms.T, -slack]])
    limits = [(0, cap) for cap in peak] + [(0, None)] * n_sites
    return linprog(cost, above, np.concatenate([-row, row]), bounds=limits).fun


def test_close_to_the_linear_program_and_never_below(collab, new):
    level, ratio = collab.levels[0], 10.0 / 300.0
    found = dense_codes(collab.transform(as_rows(new)), len(level.atoms)).astype(float)
    atoms = level.atoms.astype(float)
    cost = ratio * found.sum(axis=1) + np.abs(new - found @ atoms).sum(axis=1)
    best = np.array([program(row, atoms, level.peak, ratio) for row in new.astype(float)])
    assert (cost >= best - 1e-4).all()
    assert cost.mean() <= 1.01 * best.mean()
    assert (found <= level.peak.astype(np.float32) + 1e-7).all()


def test_finer_codes_are_the_product_with_the_links(collab, new):
    coarse, fine = (collab.transform(as_rows(new), level=level) for level in (1, 2))
    links = collab.levels[1].links
    product = dense_codes(coarse, len(links)) @ links
    assert dense_codes(fine, links.shape[1]) == pytest.approx(product, rel=1e-5, abs=1e-6)
    for start, stop in zip(fine.indptr[:-1], fine.indptr[1:], strict=True):
        assert (np.diff(fine.atom[start:stop].astype(int)) > 0).all()


def test_frame_has_a_line_per_code():
    codes = Codes(
        np.array([0, 2, 2, 3]), np.array([1, 4, 0], np.uint32), np.array([0.5, 1, 2], np.float32)
    )
    assert codes.frame().rows() == [(0, 1, 0.5), (0, 4, 1.0), (2, 0, 2.0)]
    assert repr(codes) == "Codes(3 rows, 1.0 atoms a row)"
    assert np.array_equal(Codes.join([codes, codes]).row, [0, 0, 2, 3, 3, 5])


def test_recorded_activations_are_taken_as_fitted(acts):
    found = HSDL(atoms=(4, 6), rows="sample", weights="binary", threads=1).fit(acts)
    assert found.transform(acts).n_rows == acts.n_samples


def test_an_empty_set_of_rows_has_no_codes(collab):
    empty = np.zeros((3, collab.n_sites), np.float32)
    assert collab.transform(as_rows(empty)).indptr.tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match="rows is empty"):
        collab.transform(as_rows(empty[:0]))


def test_what_does_not_fit_is_refused(collab, acts):
    with pytest.raises(SettingsError, match="5 sites"):
        collab.transform(as_rows(np.ones((2, 5), np.float32)))
    with pytest.raises(SettingsError, match="layers of"):
        collab.transform(acts)
    with pytest.raises(SettingsError, match="level"):
        collab.transform(as_rows(np.ones((2, collab.n_sites), np.float32)), level=3)
