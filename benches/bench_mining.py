"""Mining beside installed miners and NumPy, at equal output, on real routing.

Peers count pairs of the same tokens above the same floor; ours and theirs are compared before
anything is timed. Threads: 1, since the peers have one.
"""

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import moecollab as mc
from mine_large import N_EXPERTS, ROUTING, as_rows, real_ids
from moecollab.record.rows import Rows

SIZES = [1_000, 10_000]
FLOOR = 0.001
needs_routing = pytest.mark.skipif(not ROUTING.is_dir(), reason=f"no real routing in {ROUTING}")


def some(n_tokens: int) -> Rows:
    """The first tokens of the real routing."""
    return as_rows(real_ids()[:n_tokens])


def baskets(rows: Rows) -> list[list[int]]:
    """Sites of every token as lists."""
    return rows.sites.reshape(rows.n_rows, -1).tolist()


def least(rows: Rows) -> int:
    """The floor as a count."""
    return max(1, int(np.ceil(FLOOR * rows.n_rows)))


def ours(rows: Rows, null: str = "none") -> mc.Mined:
    """All pairs above the floor."""
    return mc.mine(rows, n_experts=N_EXPERTS, min_support=FLOOR, null=null, threads=1)


def as_counts(found: mc.Mined) -> dict[tuple[int, int], int]:
    """Count of every pair of sites."""
    site = [pl.col(f"layer_{x}") * N_EXPERTS + pl.col(f"expert_{x}") for x in "ab"]
    return dict(
        zip(found.table.select(a=site[0], b=site[1]).rows(), found.table["count"], strict=True)
    )


def by_apriori(rows: Rows) -> dict[tuple[int, int], int]:
    """The fastest of Borgelt's miners for pairs (of apriori, eclat, fpgrowth, relim and sam)."""
    fim = pytest.importorskip("fim", reason="pyfim is not installed")
    return fim.apriori(baskets(rows), target="s", supp=-least(rows), zmin=2, zmax=2, report="a")


def by_numpy(rows: Rows) -> np.ndarray:
    """Counts as a product of dense float32 matrices (BLAS)."""
    x = rows.dense()
    return x.T @ x


@needs_routing
@pytest.mark.parametrize("n_tokens", SIZES)
@pytest.mark.parametrize("null", ["none", "load"])
def test_pairs(benchmark, n_tokens, null):
    rows = some(n_tokens)
    found = benchmark.pedantic(ours, (rows, null), rounds=3, iterations=1)
    first, second = np.triu_indices(rows.n_sites, 1)
    counts = by_numpy(rows)[first, second].astype(int)
    kept = counts >= least(rows)
    expected = dict(zip(zip(first[kept], second[kept], strict=True), counts[kept], strict=True))
    assert as_counts(found) == expected


@needs_routing
@pytest.mark.parametrize("n_tokens", SIZES)
def test_pairs_by_numpy(benchmark, n_tokens):
    rows = some(n_tokens)
    assert benchmark.pedantic(by_numpy, (rows,), rounds=3, iterations=1).max() > 0


@needs_routing
@pytest.mark.parametrize("n_tokens", SIZES)
def test_pairs_by_pyfim_apriori(benchmark, n_tokens):
    rows = some(n_tokens)
    by_apriori(some(10))  # skips if it is not there
    found = benchmark.pedantic(by_apriori, (rows,), rounds=3, iterations=1)
    assert {tuple(sorted(s)): count for s, count in found} == as_counts(ours(rows))


@needs_routing
def test_pairs_by_mlxtend(benchmark):
    patterns = pytest.importorskip("mlxtend.frequent_patterns", reason="mlxtend is not installed")
    pandas = pytest.importorskip("pandas")
    rows = some(100)
    table = pandas.DataFrame(rows.dense() > 0)

    def run():
        return patterns.fpgrowth(table, min_support=0.2, max_len=2)

    found = benchmark.pedantic(run, rounds=1, iterations=1)
    mined = mc.mine(rows, n_experts=N_EXPERTS, min_support=0.2, null="none")
    assert (found["itemsets"].map(len) == 2).sum() == mined.n_found


@needs_routing
def test_pairs_by_efficient_apriori(benchmark):
    miner = pytest.importorskip("efficient_apriori", reason="efficient-apriori is not installed")
    rows = some(200)
    lists = baskets(rows)

    def run():
        return miner.itemsets_from_transactions(lists, min_support=0.05, max_length=2)[0][2]

    found = benchmark.pedantic(run, rounds=1, iterations=1)
    mined = mc.mine(rows, n_experts=N_EXPERTS, min_support=0.05, null="none")
    assert {tuple(sorted(s)): count for s, count in found.items()} == as_counts(mined)


@needs_routing
def test_triplets(benchmark):
    rows = some(500)
    work = {"n_experts": N_EXPERTS, "min_support": 0.05, "null": "none", "threads": 1}
    found = benchmark.pedantic(mc.mine, (rows, 3), work, rounds=1, iterations=1)
    assert found.n_found > 0


@needs_routing
def test_triplets_by_pyfim_apriori(benchmark):
    fim = pytest.importorskip("fim", reason="pyfim is not installed")
    rows = some(500)
    lists = baskets(rows)
    work = {"target": "s", "supp": -25, "zmin": 3, "zmax": 3, "report": "|"}
    found = benchmark.pedantic(fim.apriori, (lists,), work, rounds=1, iterations=1)
    mined = mc.mine(rows, 3, n_experts=N_EXPERTS, min_support=0.05, null="none")
    assert sum(found[2]) == mined.n_found
