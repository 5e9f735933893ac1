"""Exhaustive mining: counts by brute force, chance by simulation and convolution, files, errors."""

import math
import pickle
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moecollab as mc
from moecollab.errors import (
    DataError,
    MissingInputError,
    OutputExistsError,
    SchemaError,
    SettingsError,
    ShapeError,
    StaleInputError,
)
from moecollab.patterns import mining
from moecollab.record.rows import Rows
from planted import as_rows, planted
from real_routing import read, routing_folder
from routed import as_matrix, routed, swapped


def members(table, size):
    """Sites of each row for layers of 16 experts that count from 0."""
    letters = "abcdef"[:size]
    return [
        tuple(16 * row[f"layer_{x}"] + row[f"expert_{x}"] for x in letters)
        for row in table.iter_rows(named=True)
    ]


def core_pairs(x, n_experts, strata=None):
    """Everything the core says about all pairs of a boolean matrix, in order of their sites."""
    from moecollab._core import mine_sets

    rows = as_rows(x.astype(np.float32))
    wanted = {"n_experts": n_experts, "size": 2, "least": 0, "top": 10**6, "by_lift": False}
    arrays = (rows.indptr, rows.sites, rows.values)
    wanted |= {"chance": True, "threads": 1}
    found = mine_sets(arrays, rows.n_sites, strata, wanted, lambda *_: None)
    order = np.lexsort(found["site"].T[::-1])
    return {name: found[name][order] for name in ("count", "expected", "variance", "log10_p")}


@pytest.fixture(scope="module")
def rows():
    return as_rows(planted(noise=0.05)[0])


@pytest.mark.parametrize("size", [2, 3])
def test_mining_equals_brute_force(rows, size):
    x = rows.dense() > 0
    found = mc.mine(rows, size, n_experts=16, min_support=0.01, top=10**6, threads=1)
    counts = {s: int(x[:, s].all(axis=1).sum()) for s in combinations(range(96), size)}
    kept = {sites: count for sites, count in counts.items() if count >= 4}
    assert dict(zip(members(found.table, size), found.table["count"], strict=True)) == kept
    assert found.complete
    assert found.n_sets == len(counts)
    assert found.table["count"].to_list() == sorted(kept.values(), reverse=True)
    histogram = dict(found.histogram.iter_rows())
    for count in set(kept.values()):
        assert histogram[count] == sum(value == count for value in kept.values())
    share = x.mean(axis=0)
    for row, sites in zip(
        found.table.iter_rows(named=True), members(found.table, size), strict=True
    ):
        lift = row["count"] / 400 / np.prod(share[list(sites)])
        assert row["support"] == pytest.approx(row["count"] / 400)
        assert row["lift"] == pytest.approx(lift)
        assert row["pmi"] == pytest.approx(math.log2(lift))


def test_four_tokens_by_hand():
    # Two layers of two experts; the first of each are together in tokens 0 and 1.
    x = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]], np.float32)
    table = mc.mine(as_rows(x), n_experts=2, threads=1).table
    row = table.row(by_predicate=(pl.col("layer_b") == 1) & (pl.col("expert_b") == 0), named=True)
    assert (row["layer_a"], row["expert_a"], row["count"]) == (0, 0, 2)
    assert (row["lift"], row["pmi"], row["expected"]) == (2.0, 1.0, 1.0)
    assert row["z"] == pytest.approx(1 / math.sqrt(1 / 3))
    assert row["log10_p"] == pytest.approx(math.log10(1 / 6))
    # Six pairs; two are this certain, four have p = 1.
    assert row["q"] == pytest.approx(6 / 2 / 6)
    assert row["relation"] == "neighbouring"
    assert table.height == 2


def test_best_by_lift_and_larger_sets(rows):
    all_of_them = mc.mine(rows, 4, n_experts=16, min_support=0.02, top=10**6, by="lift")
    lift = all_of_them.table["lift"].to_numpy()
    assert (lift[1:] <= lift[:-1] * (1 + 1e-12)).all()
    assert all_of_them.n_found > 5
    best = mc.mine(rows, 4, n_experts=16, min_support=0.02, top=5, by="lift")
    assert best.table.drop("q").equals(all_of_them.table.drop("q").head(5))
    assert not best.complete
    assert "best 5 of" in repr(best)
    pairs = mc.mine(rows, n_experts=16, top=7, by="lift").table
    assert pairs["lift"].to_list() == sorted(pairs["lift"], reverse=True)


@pytest.mark.parametrize("size", [2, 3])
def test_counting_alone_gives_the_same_counts(rows, size):
    chance = ["expected", "z", "log10_p", "q"]
    found = mc.mine(rows, size, n_experts=16)
    alone = mc.mine(rows, size, n_experts=16, null="none")
    assert alone.table.drop(chance).equals(found.table.drop(chance))
    assert all(alone.table[name].null_count() == alone.table.height for name in chance)
    assert "above chance" in repr(found)
    assert "chance" not in repr(alone)


def test_relation_is_the_longest_step(rows):
    table = mc.mine(rows, 3, n_experts=16, min_support=0.01, top=10**6).table
    for row in table.iter_rows(named=True):
        steps = np.diff([row["layer_a"], row["layer_b"], row["layer_c"]])
        if (steps == 0).any():
            assert row["relation"] == "same layer"
        else:
            assert row["relation"] == ("neighbouring" if max(steps) == 1 else "distant")
    inside = table.filter(pl.col("layer_a") == pl.col("layer_c"))
    assert inside.height > 0
    assert inside["log10_p"].null_count() == inside.height
    assert inside["q"].null_count() == inside.height


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_pairs_do_not_depend_on_threads_or_on_the_order_of_tokens(seed):
    x = planted(n_rows=90, noise=0.05, seed=seed)[0]
    found = mc.mine(as_rows(x), n_experts=16, threads=1).table
    for threads in (2, 3, 8):
        assert mc.mine(as_rows(x), n_experts=16, threads=threads).table.equals(found)
    order = np.random.default_rng(seed).permutation(len(x))
    assert mc.mine(as_rows(x[order]), n_experts=16, threads=2).table.equals(found)


def test_tails_between_layers_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = planted(n_rows=300, noise=0.1)[0] > 0
    found, load = core_pairs(x, 16), x.sum(axis=0)
    first, second = np.triu_indices(96, 1)
    cross = first // 16 != second // 16
    expected = stats.hypergeom.logsf(found["count"].astype(int) - 1, 300, load[first], load[second])
    np.testing.assert_allclose(found["log10_p"][cross], expected[cross] / np.log(10), 1e-7, 1e-9)
    mean, variance = stats.hypergeom.stats(300, load[first], load[second])
    np.testing.assert_allclose(found["expected"][cross], mean[cross], 1e-12)
    np.testing.assert_allclose(found["variance"][cross], variance[cross], 1e-9, 1e-12)


def within_token(x, token, count, first, second):
    """log10 P(X >= count) by convolution of the hypergeometric counts of every token id."""
    from scipy import stats

    parts = np.ones(1)
    for one in np.unique(token):
        own = x[token == one]
        a, b, n = own[:, first].sum(), own[:, second].sum(), len(own)
        parts = np.convolve(parts, stats.hypergeom.pmf(np.arange(min(a, b) + 1), n, a, b))
    return np.log10(parts[count:].sum())


def test_tails_within_token_ids_are_near_the_exact_ones():
    pytest.importorskip("scipy.stats")
    x, token = routed(2000, 4, 16, 3, kinds=200, seed=1)
    found = core_pairs(x, 16, token)
    first, second = np.triu_indices(64, 1)
    z = (found["count"] - found["expected"]) / np.sqrt(found["variance"])
    cross = np.flatnonzero(first // 16 != second // 16)
    chosen = cross[np.argsort(z[cross])][::29]
    assert z[chosen].min() < -3
    assert z[chosen].max() > 8
    for pair in chosen:
        exact = within_token(x, token, found["count"][pair], first[pair], second[pair])
        got = found["log10_p"][pair]
        allowed = 0.02 if z[pair] < 5 else 0.2
        assert got == pytest.approx(exact, rel=allowed, abs=2e-3), z[pair]


def uniform(found, chosen, rng):
    """p of a Kolmogorov test that p-values are uniform, ties of counts broken at random."""
    from scipy import stats

    spread = np.sqrt(found["variance"][chosen])
    z = (found["count"][chosen] - found["expected"][chosen]) / spread
    jump = stats.norm.pdf(z) / spread
    p = 10.0 ** found["log10_p"][chosen] - rng.random(len(chosen)) * jump
    return stats.kstest(p, "uniform").pvalue


@pytest.mark.parametrize("null", ["load", "token"])
@pytest.mark.parametrize("where", ["between", "within"])
def test_p_values_are_uniform_under_the_null(null, where):
    pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(8)
    x, token = routed(3000, 6, 32, 4, kinds=60, seed=2)
    strata = token if null == "token" else np.zeros(3000, np.uint32)
    first, second = np.triu_indices(192, 1)
    inside = first // 32 == second // 32
    kind = np.flatnonzero(inside if where == "within" else ~inside)
    real = core_pairs(x, 32, strata)
    kind = kind[real["variance"][kind] > 4]
    # Pairs share experts; a part of them is nearly independent.
    chosen = rng.choice(kind, min(300, len(kind) // 3), replace=False)
    assert uniform(real, chosen, rng) < 1e-4
    shuffled = swapped(x, strata, 32, rng) if where == "within" else x.copy()
    for layer in range(6):
        sites = slice(32 * layer, 32 * layer + 32)
        for one in np.unique(strata):
            own = np.flatnonzero(strata == one)
            shuffled[own, sites] = shuffled[rng.permutation(own), sites]
    assert uniform(core_pairs(shuffled, 32, strata), chosen, rng) > 0.01


@pytest.mark.parametrize("kinds", [1, 60])
def test_chance_within_a_layer_equals_swaps(kinds):
    rng = np.random.default_rng(4)
    x, token = routed(300, 1, 12, 3, kinds=kinds, seed=3)
    found = core_pairs(x, 12, token)
    upper = np.triu_indices(12, 1)
    counts, table = [], x
    for _ in range(300):
        table = swapped(table, token, 12, rng, sweeps=2)
        counts.append((table.T.astype(int) @ table)[upper])
    mean, variance = np.mean(counts[5:], axis=0), np.var(counts[5:], axis=0)
    moves = variance > 0.5
    off = (mean - found["expected"])[moves] / np.sqrt(variance[moves])
    assert np.abs(off).max() < 0.35  # a mean of some 150 independent tables
    assert np.median(variance[moves] / found["variance"][moves]) == pytest.approx(1, abs=0.06)


def test_token_identity_explains_what_it_makes():
    # The router looks at nothing but the token id: with ids kept, nothing is left.
    x, token = routed(3000, 4, 16, 3, kinds=40, context=0.0, seed=5)
    load, kept = core_pairs(x, 16), core_pairs(x, 16, token)
    assert (load["log10_p"] < -10).mean() > 0.05
    assert (kept["log10_p"] < -4).mean() < 1e-3


def test_activations_by_token_and_by_load(acts, tmp_path):
    token = mc.mine(acts, null="token", out=tmp_path / "m")
    load = mc.mine(acts.path)
    on = ["layer_a", "expert_a", "layer_b", "expert_b"]
    both = load.table.join(token.table, on=on, how="inner")
    assert both.height == load.table.height
    assert both["count"].equals(both["count_right"].rename("count"))
    assert (both["expected"] - both["expected_right"]).abs().max() > 0.1
    assert token.activations == acts.digest()
    assert set(token.table["layer_a"]) <= set(acts.layers)
    triplets = mc.mine(acts, 3, null="token", min_support=0.05)
    assert triplets.table["log10_p"].drop_nulls().len() > 0
    assert (tmp_path / "m" / "manifest.json").exists()


def test_save_and_load_round_trip(rows, tmp_path):
    found = mc.mine(rows, 3, n_experts=16, min_support=0.02)
    found.save(tmp_path / "m")
    again = mc.load_mined(tmp_path / "m")
    assert repr(again) == repr(found)
    assert again.table.equals(found.table)
    assert again.histogram.equals(found.histogram)
    assert again.settings == found.settings
    again.save(tmp_path / "n")
    for file in sorted((tmp_path / "m").iterdir()):
        assert file.read_bytes() == (tmp_path / "n" / file.name).read_bytes()
    with pytest.raises(OutputExistsError):
        found.save(tmp_path / "m")
    assert pickle.loads(pickle.dumps(found)).table.equals(found.table)


def test_damaged_and_foreign_files_are_told(rows, tmp_path):
    mc.mine(rows, n_experts=16, out=tmp_path / "m")
    with pytest.raises(DataError, match="holds no mined sets"):
        mc.load_mined(tmp_path)
    manifest = tmp_path / "m" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"size": 2', '"size": 3'))
    with pytest.raises(SchemaError, match=r"sets\.parquet has other columns"):
        mc.load_mined(tmp_path / "m")
    manifest.write_text(text.replace('"least"', '"last"'))
    with pytest.raises(SchemaError, match="lacks 'least'"):
        mc.load_mined(tmp_path / "m")
    manifest.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(SchemaError, match="mined version 9"):
        mc.load_mined(tmp_path / "m")
    manifest.write_text(text)
    sets = tmp_path / "m" / "sets.parquet"
    sets.write_bytes(sets.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"sets\.parquet is missing, truncated or damaged"):
        mc.load_mined(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 1),
        ("size", 7),
        ("size", 2.5),
        ("min_support", 0),
        ("min_support", 1.2),
        ("min_support", float("nan")),
        ("top", 0),
        ("by", "luck"),
        ("null", "chance"),
        ("n_experts", 0),
        ("n_experts", 17),
        ("threads", 0),
    ],
)
def test_settings_out_of_range_are_refused(rows, name, value):
    with pytest.raises(SettingsError, match=f"^{name} is"):
        mc.mine(rows, **({"n_experts": 16} | {name: value}))


def test_rows_that_cannot_be_mined_are_told(rows, monkeypatch):
    with pytest.raises(MissingInputError, match="pass n_experts"):
        mc.mine(rows)
    with pytest.raises(MissingInputError, match="needs token ids"):
        mc.mine(rows, n_experts=16, null="token")
    with pytest.raises(DataError, match="no active experts"):
        mc.mine(as_rows(np.zeros((3, 4), np.float32)), n_experts=2)
    with pytest.raises(DataError, match="no active experts"):
        mc.mine(as_rows(np.zeros((0, 4), np.float32)), n_experts=2)
    with pytest.raises(DataError, match="1 experts, too few for sets of 2"):
        mc.mine(as_rows(np.ones((3, 1), np.float32)), n_experts=1)
    with pytest.raises(ShapeError, match=r"site 4 is outside \[0, 4\)"):
        Rows(np.array([0, 1]), np.array([4], np.uint32), *_values(1), 4)
    monkeypatch.setattr(mining, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"needs about 0\.0 GB of memory but .* mine fewer tokens"):
        mc.mine(rows, n_experts=16)
    monkeypatch.setattr(mining, "available_memory", lambda: None)
    mc.mine(rows, n_experts=16)


def _values(n):
    return np.ones(n, np.float32), np.zeros(n, np.uint32)


def test_ctrl_c_and_other_exceptions_pass_through(rows):
    from moecollab._core import mine_sets

    wanted = {"n_experts": 16, "size": 2, "least": 1, "top": 1, "by_lift": False}
    wanted |= {"chance": True, "threads": 1}
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def stop(stage, share, error=error):
            raise error

        with pytest.raises(error):
            mine_sets((rows.indptr, rows.sites, rows.values), 96, None, wanted, stop)


def test_the_core_checks_what_it_is_given(rows):
    from moecollab._core import count_sets, mine_sets

    arrays = (rows.indptr, rows.sites, rows.values)
    good = {"n_experts": 16, "size": 3, "least": 1, "top": 1, "by_lift": False}
    good |= {"chance": True, "threads": 1}
    for bad in ({"n_experts": 5}, {"n_experts": 0}, {"size": 9}, {"least": 0}):
        name = next(iter(bad))
        with pytest.raises(SettingsError, match=f"^{name} is"):
            mine_sets(arrays, 96, None, good | bad, lambda *_: None)
    with pytest.raises(ShapeError, match="strata has length 3, expected 400"):
        mine_sets(arrays, 96, np.zeros(3, np.uint32), good, lambda *_: None)
    with pytest.raises(DataError, match="sets holds 96 at position 1"):
        count_sets(arrays, 96, np.array([[0, 96]], np.uint32), 1)


def test_coverage_by_hand():
    # Counts of the six pairs of four experts: (0, 2) 3, (1, 3) 2, (0, 3) 1, the others 0.
    x = np.array([[1, 0, 1, 0]] * 3 + [[0, 1, 0, 1]] * 2 + [[1, 0, 0, 1]], np.float32)
    mined = mc.mine(as_rows(x), n_experts=2, min_support=0.01)
    first, other, rare = [(0, 0), (1, 0)], [(0, 1), (1, 1)], [(0, 0), (0, 1)]
    sets = [first, other, rare, first, [*first, (0, 1)]]
    table = mc.coverage(sets, mined, shares=(1 / 6, 2 / 6, 0.5))
    assert table["n_patterns"].to_list() == [3, 3, 3]
    assert table["least_count"].to_list() == [3, 2, 1]
    assert table["covered"].to_list() == [1, 2, 2]
    assert table["coverage"].to_list() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert table["chance"].to_list() == pytest.approx([1 / 6, 2 / 6, 0.5])
    # A third of the three pairs that never occur fits into four of six.
    tied = mc.coverage([rare], mined, as_rows(x), shares=(4 / 6,))
    assert tied["covered"].to_list() == pytest.approx([1 / 3])
    with pytest.raises(SettingsError, match="shares is 0"):
        mc.coverage(sets, mined, shares=(0,))
    with pytest.raises(SettingsError, match="patterns is"):
        mc.coverage([[(0, 2), (1, 0)]], mined)


def test_coverage_of_a_fit_is_above_chance_and_checks_its_inputs(rows):
    x, groups = planted(noise=0.01, n_rows=600)
    rows = as_rows(x)
    collab = mc.HSDL(atoms=(40,), sparsity=0.1, reconstruction=100, threads=1).fit(rows)
    planted_sets = [
        [(int(s) // 16, int(s) % 16) for s in np.flatnonzero(group)] for group in groups
    ]
    triplets = mc.mine(rows, 3, n_experts=16, min_support=0.001)
    pairs = mc.mine(rows, 2, n_experts=16)
    for mined in (pairs, triplets):
        table = mc.coverage(planted_sets, mined, rows, shares=(0.01, 0.05))
        assert table["coverage"][1] > 0.9
    with pytest.raises(SettingsError, match="patterns is"):
        mc.coverage(collab, pairs)  # a fit of rows knows one layer only
    with pytest.raises(MissingInputError, match="mine with a smaller min_support"):
        mc.coverage(planted_sets, mc.mine(rows, 3, n_experts=16, min_support=0.5), rows)
    few = mc.mine(rows, 2, n_experts=16, top=3)
    with pytest.raises(MissingInputError, match="pass the activations as acts"):
        mc.coverage(planted_sets, few)
    with pytest.raises(StaleInputError):
        mc.coverage(planted_sets, pairs, as_rows(x[:100]))


def test_real_pairs_equal_an_installed_miner_and_co_activate():
    fim = pytest.importorskip("fim", reason="pyfim is not installed")
    x = as_matrix(read(routing_folder(), ["intent"])[0][:2000], 64)
    found = mc.mine(as_rows(x.astype(np.float32)), n_experts=64, min_support=0.02)
    baskets = [np.flatnonzero(row).tolist() for row in x]
    other = fim.eclat(baskets, target="s", supp=-40, zmin=2, zmax=2, report="a")
    table = found.table.select(
        a=pl.col("layer_a") * 64 + pl.col("expert_a"), b=pl.col("layer_b") * 64 + pl.col("expert_b")
    )
    mined = dict(zip(table.rows(), found.table["count"], strict=True))
    assert mined == {tuple(sorted(sites)): count for sites, count in other}
    # The paper's claim: pairs of different layers meet far more often than by chance.
    across = found.table.filter(pl.col("relation") != "same layer")
    assert (across["q"] < 0.01).mean() > 0.2
    assert across["lift"].quantile(0.999) > 5
