"""Sums by fold and domain at once, taken apart into sums by either."""

import tracemalloc

import numpy as np
import pytest

from moecollab.record.folding import folds_of, in_folds, out_of_folds
from moecollab.record.sums import GROUPS
from moecollab.record.tallies import Tallies
from moecollab.record.windows import Document, Sample


def make_cells(domains, n_folds, n_experts=4):
    """Sums of samples in folds; not every domain is in every fold."""
    documents = [Document("text", domain) for domain in domains]
    samples = [Sample(one, np.zeros(1, np.uint32)) for one in documents]
    names = sorted({one.document.domain for one in in_folds(samples, n_folds, seed=1)})
    rng = np.random.default_rng(0)
    cells = Tallies.zeros(names, 3, n_experts, groups=GROUPS, width=5)
    for value in cells.arrays.values():
        value[...] = rng.integers(1, 200, value.shape)
    return cells


def slow(cells, part):
    """Sums over the cells of which one part of the name is the same."""
    names = [cell.split("\0")[part] for cell in cells.domains]
    for name in sorted(set(names)):
        own = [cell for cell, its in zip(cells.domains, names, strict=True) if its == name]
        yield name if part else str(int(name)), cells.select(own).total()


def check_same(found, expected):
    assert found.domains == tuple(name for name, _ in expected)
    for name, (_, sums) in enumerate(expected):
        for key, value in sums.arrays.items():
            assert np.array_equal(found[key][name], value), key


@pytest.mark.parametrize(
    ("domains", "n_folds"), [(["a"] * 9, 4), (["b", "a", "a", "c"] * 5, 3), (["a", "b"], 2)]
)
def test_sums_by_domain_and_by_fold_beside_their_slow_twin(domains, n_folds):
    cells = make_cells(domains, n_folds)
    by_domain, by_fold = list(slow(cells, 1)), list(slow(cells, 0))
    found = out_of_folds(cells)
    check_same(found[0], by_domain)
    check_same(found[1], by_fold)


@pytest.mark.parametrize(("n_domains", "most"), [(1, 0.4), (4, 0.6)])
def test_sums_of_folds_are_not_held_twice(n_domains, most):
    """Of 8 folds, new are the sums by domain, an eighth, and with 4 domains by fold, a quarter."""
    cells = make_cells([str(n % n_domains) for n in range(256)], 8, n_experts=64)
    assert len(cells.domains) == 8 * n_domains
    size = sum(value.nbytes for value in cells.arrays.values())
    tracemalloc.start()
    out_of_folds(cells)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * size


def test_folds_hold_as_many_documents_as_can_be():
    assert sorted(np.bincount(folds_of(10, 4))) == [2, 2, 3, 3]
