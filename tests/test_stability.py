"""Matching of atoms, robustness and sweeps."""

import numpy as np
import polars as pl
import pytest

import moecollab as mc
from moecollab.errors import DataError, SchemaError, SettingsError
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.stability import reroute
from moecollab.patterns.sweep import relative_error
from moecollab.record.rows import Rows
from planted import as_rows, dense_codes, planted

LAYERS, EXPERTS = 6, 16


@pytest.fixture(scope="module")
def rows():
    found = as_rows(planted(n_rows=400, noise=0.005)[0])
    sample = np.arange(400, dtype=np.uint32) // 8
    return Rows(found.indptr, found.sites, found.values, sample, found.n_sites)


@pytest.fixture(scope="module")
def hsdl():
    return HSDL(atoms=(28, 40), sparsity=1.0, threads=1)


@pytest.fixture(scope="module")
def fit(hsdl, rows):
    return hsdl.fit(rows)


def test_a_fit_agrees_with_itself_in_any_order(fit):
    for level in (1, 2):
        matches = mc.match_atoms(fit, fit, level)
        assert matches["other"].to_list() == matches["atom"].to_list()
        assert matches["cosine"].to_numpy() == pytest.approx(1)
        assert matches["use"].sum() == pytest.approx(1)
    assert mc.stability([fit, fit, fit]) == pytest.approx(1)


def test_cosines_are_those_of_the_partners(fit, hsdl, rows):
    other = HSDL(atoms=(20, 40), sparsity=1.0, seed=5, threads=1).fit(rows)
    matches = mc.match_atoms(fit, other)
    assert matches["other"].null_count() == fit.live(1).sum() - other.live(1).sum()
    for atom, partner, cosine, _ in matches.iter_rows():
        if partner is None:
            assert cosine == 0
            continue
        a, b = (f.levels[0].atoms[i].astype(float) for f, i in ((fit, atom), (other, partner)))
        assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    partners = matches["other"].drop_nulls().to_list()
    assert len(set(partners)) == len(partners)
    assert 0.5 < mc.stability([fit, other]) < 1


def test_rerouting_keeps_layers_and_sums(rows):
    moved = reroute(rows, EXPERTS, 0.3, seed=1)
    before, after = (r.dense().reshape(-1, LAYERS, EXPERTS) for r in (rows, moved))
    assert after.sum(axis=2) == pytest.approx(before.sum(axis=2), rel=1e-5)
    assert 0.25 < ((before > 0) & (after == 0)).sum() / (before > 0).sum() < 0.33
    same = reroute(rows, EXPERTS, 1e-12, seed=1)
    assert np.array_equal(same.dense(), rows.dense())


def test_robustness_falls_with_noise(hsdl, rows):
    found = mc.robustness(hsdl, rows, noise=(0.02, 0.6), shares=(0.5,), seeds=2, n_experts=EXPERTS)
    assert found.shape == (2 * 4 * 2, 7)
    mean = found.filter(pl.col("level") == 1).group_by("change", "amount").mean()
    cosine = {(change, amount): c for change, amount, _, _, c, _, _ in mean.iter_rows()}
    assert cosine["noise", 0.02] > 0.8 > cosine["noise", 0.6]
    assert found["cosine"].is_between(0, 1 + 1e-9).all()


def test_bad_settings_of_robustness(hsdl, rows):
    with pytest.raises(SettingsError, match="n_experts"):
        mc.robustness(hsdl, rows)
    with pytest.raises(SettingsError, match="noise is 1"):
        mc.robustness(hsdl, rows, noise=(1,), n_experts=EXPERTS)
    with pytest.raises(SettingsError, match="fits is 1"):
        mc.stability([hsdl])


def test_sweep_has_a_line_per_setting_and_seed(hsdl, rows):
    found = hsdl.sweep(rows, reconstruction=(3, 300), atoms=((8,), (28, 40)), seeds=2)
    assert len(found) == 8
    assert found["atoms"].unique().sort().to_list() == ["28, 40", "8"]
    cheap = found.filter(pl.col("reconstruction") == 3)
    dear = found.filter(pl.col("reconstruction") == 300)
    assert dear["held_out_error"].mean() < cheap["held_out_error"].mean()
    assert dear["live"].mean() > cheap["live"].mean()
    assert found["stability"].null_count() == 0
    figure = mc.sweep_figure(found)
    assert list(figure.data[0].x) == found["held_out_error"].to_list()
    assert "reconstruction 300" in figure.data[0].y[-1]


def test_relative_error_is_the_dense_one(fit, rows):
    codes = fit.transform(rows)
    x = rows.dense().astype(float)
    rest = x - dense_codes(codes, 28).astype(float) @ fit.levels[0].atoms
    assert relative_error(fit, rows, codes) == pytest.approx(np.abs(rest).sum() / x.sum())


def test_bad_sweeps(hsdl, rows):
    with pytest.raises(SettingsError, match="parameter is 'colour'"):
        hsdl.sweep(rows, colour=(1,))
    with pytest.raises(SettingsError, match="sparsity is -1"):
        hsdl.sweep(rows, sparsity=(-1,))
    with pytest.raises(SettingsError, match="held_out"):
        hsdl.sweep(rows, held_out=1.0)
    with pytest.raises(DataError, match="1 samples cannot be split"):
        hsdl.sweep(rows.take(np.arange(5)))
    with pytest.raises(SchemaError, match="lacks covered"):
        mc.sweep_figure(pl.DataFrame({"live": [1], "held_out_error": [0.1], "stability": [0.2]}))
