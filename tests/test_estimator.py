"""HSDL as an estimator of scikit-learn."""

import numpy as np
import pytest
from scipy.sparse import coo_array, csr_array

from moecollab.errors import DataError, MissingInputError, SettingsError, ShapeError
from moecollab.patterns.dictionary import HSDL
from moecollab.record.rows import Rows
from planted import as_rows, dense_codes, planted

sklearn = pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def x():
    return planted(n_rows=200, noise=0.01)[0]


def small(**settings):
    return HSDL(atoms=(12, 16), threads=1, **settings)


def test_clone_and_parameters():
    from sklearn.base import clone

    hsdl = small(seed=4)
    twin = clone(hsdl)
    assert twin == hsdl
    assert twin is not hsdl
    assert twin.set_params(sparsity=2.0, seed=1).get_params()["sparsity"] == 2.0
    with pytest.raises(SettingsError, match="parameter is 'lambda'"):
        twin.set_params(**{"lambda": 1})
    with pytest.raises(SettingsError, match="sparsity"):
        twin.set_params(sparsity=-1.0)
    assert twin.sparsity == 2.0


def test_in_a_pipeline(x):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.pipeline import make_pipeline

    pipe = make_pipeline(small(), TruncatedSVD(2, random_state=0))
    assert pipe.fit_transform(x).shape == (200, 2)
    assert pipe.transform(csr_array(x[:7])).shape == (7, 2)
    last = make_pipeline(small())
    assert last.fit(x).transform(x[:5]).shape == (5, 12)


def test_fit_transform_is_the_codes_of_the_fit(x):
    hsdl = small()
    codes = hsdl.fit_transform(x)
    assert np.array_equal(codes.toarray(), dense_codes(hsdl.collaboration_.codes, 12))
    assert np.array_equal(
        hsdl.transform(x[:9]).toarray(),
        dense_codes(hsdl.collaboration_.transform(as_rows(x[:9])), 12),
    )


def test_dense_sparse_and_rows_are_the_same(x):
    found = [small().fit(form).objective for form in (x, csr_array(x), coo_array(x), as_rows(x))]
    assert len(set(found)) == 1


def test_not_fitted_is_told(x):
    with pytest.raises(MissingInputError, match="call fit first"):
        small().transform(x)


def test_bad_matrices_are_refused(x):
    with pytest.raises(ShapeError, match=r"\(n_rows, n_sites\)"):
        small().fit(x[0])
    with pytest.raises(ShapeError, match="numbers"):
        small().fit(np.array([["a"]]))
    with pytest.raises(DataError, match="not finite"):
        small().fit(np.where(x > 0, np.nan, x))
    with pytest.raises(DataError, match="negative"):
        small().fit(-x)
    assert Rows.of(np.array([[0, 2], [0, 0]])).indptr.tolist() == [0, 1, 1]
