"""HSDL: the objective, the optimum, recovery, storage, settings."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from adam_twin import AdamTwin
from moecollab.errors import (
    ConvergenceWarning,
    DataError,
    OutputExistsError,
    SchemaError,
    SettingsError,
)
from moecollab.patterns.dictionary import HSDL, load_collaboration
from planted import as_rows, dense_codes, found_share, planted
from reference import best_atom_codes, best_code, best_entry, objective


@pytest.fixture(scope="module")
def data():
    return planted(noise=0.01)


@pytest.fixture(scope="module")
def collab(data):
    return HSDL(atoms=(40, 80), sparsity=0.1, reconstruction=100, seed=0, threads=1).fit(
        as_rows(data[0])
    )


def parts(collab):
    atoms = [level.atoms for level in collab.levels]
    codes = [dense_codes(collab.codes, len(atoms[0]))]
    return atoms, codes + [level.links for level in collab.levels[1:]]


def test_reported_objective_is_the_formula(data, collab):
    size, small, error, total = objective(data[0], *parts(collab), 0.1, 100.0)
    last = collab.history[-1]
    assert last["dictionary_size"] == pytest.approx(size, rel=1e-6)
    assert last["sparsity"] == pytest.approx(small, rel=1e-6)
    assert last["reconstruction"] == pytest.approx(error, rel=1e-5, abs=1e-6)
    assert collab.objective == pytest.approx(total, rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(12,), (12, 20), (8, 8, 8)]))
@settings(max_examples=15, deadline=None)
def test_objective_never_rises_and_everything_stays_in_its_box(seed, atoms):
    x, _ = planted(n_rows=60, n_groups=12, noise=0.02, seed=seed)
    found = HSDL(atoms=atoms, sparsity=0.5, reconstruction=100, seed=seed % 7, threads=1).fit(
        as_rows(x)
    )
    stages: dict[str, list[float]] = {}
    for row in found.history:
        stages.setdefault(row["stage"], []).append(row["total"])
        parts_sum = row["dictionary_size"] + 0.5 * row["sparsity"] + 100 * row["reconstruction"]
        assert row["total"] == pytest.approx(parts_sum, rel=1e-12)
    for totals in stages.values():
        assert all(b <= a * (1 + 1e-6) for a, b in pairwise(totals))
    for level in found.levels:
        assert level.atoms.min() >= 0
        assert level.atoms.max() <= 1
        assert (level.usage >= 0).all()
        assert (np.diff(level.usage) <= 0).all() or level.links is not None
        assert (level.atoms[level.peak == 0] == 0).all()
    assert (found.codes.value > 0).all()


def test_no_single_step_is_left(data, collab):
    """At the end no code, entry or whole atom can be improved by its own exact step."""
    x, atoms, codes = data[0], collab.levels[0].atoms, dense_codes(collab.codes, 40)
    lone = HSDL(atoms=(40,), sparsity=0.1, reconstruction=100, tolerance=0.0, threads=1).fit(
        as_rows(x)
    )
    atoms, codes = lone.levels[0].atoms.astype(float), dense_codes(lone.codes, 40).astype(float)
    total = objective(x, [atoms], [codes], 0.1, 100.0)[3]
    rng = np.random.default_rng(0)
    for row, atom in zip(rng.integers(0, len(x), 60), rng.integers(0, 40, 60), strict=True):
        trial = codes.copy()
        trial[row, atom] = best_code(
            x[row], atoms, codes[row], atom, 0.001, lone.levels[0].peak[atom]
        )
        assert objective(x, [atoms], [trial], 0.1, 100.0)[3] >= total * (1 - 1e-5)
    for site, atom in zip(rng.integers(0, 96, 60), rng.integers(0, 40, 60), strict=True):
        trial = atoms.copy()
        trial[atom, site] = best_entry(x[:, site], codes, atoms[:, site], atom)
        assert objective(x, [trial], [codes], 0.1, 100.0)[3] >= total * (1 - 1e-5)


def test_no_whole_atom_can_be_improved():
    x, _ = planted(n_rows=30, n_groups=5, n_experts=4, seed=1)
    x = np.round(x * 8) / 8
    found = HSDL(atoms=(6,), sparsity=0.5, reconstruction=30, tolerance=0.0).fit(as_rows(x))
    atoms, codes = found.levels[0].atoms.astype(float), dense_codes(found.codes, 6).astype(float)
    for atom in range(6):
        assert best_atom_codes(x, atoms, codes, atom, 0.5, 30) >= found.objective * (1 - 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found_in_clean_data(seed):
    x, groups = planted(n_rows=600, seed=seed)
    found = HSDL(atoms=(32,), threads=1).fit(as_rows(x))
    assert found_share(found.levels[0].atoms, groups) >= 0.9
    assert found.history[-1]["reconstruction"] < 0.02 * x.sum(axis=1).mean()


@pytest.mark.parametrize("seed", range(3))
def test_not_above_the_planted_solution_and_places_stay_free(seed):
    x, groups = planted(n_rows=600, seed=seed)
    found = HSDL(atoms=(48,), sparsity=0.1, reconstruction=50, threads=1).fit(as_rows(x))
    assert found_share(found.levels[0].atoms, groups) == 1
    assert found.live(1).sum() < 40
    truth = np.stack([nnls(groups.T.astype(float), row)[0] for row in x.astype(float)])
    assert found.objective <= 1.01 * objective(x, [groups], [truth], 0.1, 50.0)[3]


@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "reconstruction"), [(0.1, 10.0), (0.1, 100.0), (1.0, 300.0)])
def test_no_worse_than_adam(sparsity, reconstruction):
    x, _ = planted(noise=0.015, seed=1)
    hsdl = HSDL(atoms=(64,), sparsity=sparsity, reconstruction=reconstruction, threads=1)
    twin = AdamTwin(torch.from_numpy(x), (64,), sparsity, reconstruction)
    assert hsdl.fit(as_rows(x)).objective <= twin.fit()


@pytest.mark.slow
def test_two_levels_that_may_copy_are_no_worse_than_adam():
    x, _ = planted(noise=0.015, seed=1)
    hsdl = HSDL(atoms=(32, 64), sparsity=10.0, reconstruction=100.0, copies=True, threads=1)
    twin = AdamTwin(torch.from_numpy(x), (32, 64), 10.0, 100.0)
    assert hsdl.fit(as_rows(x)).objective <= twin.fit()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_copies_lower_the_objective_and_are_copies(loss):
    x = as_rows(planted(n_rows=300, noise=0.01, seed=2)[0])
    pieces = HSDL(atoms=(32, 96), loss=loss, threads=1).fit(x)
    copies = HSDL(atoms=(32, 96), loss=loss, copies=True, threads=1).fit(x)
    assert copies.objective < pieces.objective
    first, second = (level.atoms[level.peak > 0] for level in copies.levels)
    first, second = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (first, second))
    assert ((first @ second.T).max(axis=1) > 0.95).mean() > 0.8


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_best_of_some_seeds_is_kept(loss):
    x = as_rows(planted(n_rows=200, noise=0.05, seed=3)[0])
    settings = {"atoms": (12,), "loss": loss, "reconstruction": 50.0, "threads": 1}
    alone = [HSDL(**settings, seed=seed).fit(x).objective for seed in range(4, 8)]
    assert len(set(alone)) > 1
    assert HSDL(**settings, seed=4, n_init=4).fit(x).objective == min(alone)


def test_result_scales_with_the_rows(data):
    """All terms of level 1 are homogeneous: rows of another scale give codes of that scale."""
    hsdl = HSDL(atoms=(30,), threads=1)
    one, eight = (hsdl.fit(as_rows(scale * data[0])) for scale in (np.float32(1), np.float32(8)))
    assert eight.objective == pytest.approx(8 * one.objective, rel=1e-3)


def test_level_2_is_finer():
    for seed in range(3):
        x, _ = planted(n_rows=300, noise=0.01, seed=seed)
        found = HSDL(atoms=(32, 96), threads=1).fit(as_rows(x))
        sizes = [(level.atoms[level.peak > 0] >= 0.5).sum(axis=1).mean() for level in found.levels]
        assert sizes[1] < sizes[0]


def test_usage_of_level_2_goes_through_level_1(collab):
    first, second = collab.levels
    codes = dense_codes(collab.codes, len(first.atoms)).astype(np.float64)
    np.testing.assert_allclose(first.usage, codes.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(first.peak, codes.max(axis=0), rtol=0)
    np.testing.assert_allclose(second.usage, second.links.astype(float).T @ first.usage, rtol=1e-6)
    np.testing.assert_allclose(second.peak, second.links.max(axis=0), rtol=0)


def test_nothing_to_fit():
    found = HSDL(atoms=(2, 3)).fit(as_rows(np.zeros((4, 6), np.float32)))
    assert found.stop_reason == "nothing to fit"
    assert found.converged
    assert not found.live(1).any()
    assert found.objective == 0
    assert "not used by any row" in found.explain(1, 0)


def test_default_atoms_follow_the_experts_and_the_rows(data):
    found = HSDL(threads=1).fit(as_rows(data[0]))
    assert [len(level.atoms) for level in found.levels] == [29, 116]
    found = HSDL(threads=1).fit(as_rows(data[0][:10]))
    assert [len(level.atoms) for level in found.levels] == [10, 116]


def test_an_iteration_limit_warns_and_returns(data):
    with pytest.warns(ConvergenceWarning, match="stopped by max iterations in stage"):
        found = HSDL(atoms=(30, 40), max_iterations=1, threads=1).fit(as_rows(data[0]))
    assert found.stop_reason == "max iterations"
    assert not found.converged
    assert found.live(2).any()


def test_ctrl_c_returns_the_best_so_far(data, monkeypatch):
    from moecollab.patterns import dictionary

    class Impatient:
        seen = 0

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            return None

        def advance(self, steps=1):
            self.seen += 1
            if self.seen == 2:
                raise KeyboardInterrupt

        def remark(self, text):
            return None

    monkeypatch.setattr(dictionary, "track", lambda *_: Impatient())
    with pytest.warns(ConvergenceWarning, match="stopped by interrupted"):
        found = HSDL(atoms=(30, 40), threads=1).fit(as_rows(data[0]))
    assert found.stop_reason == "interrupted"
    assert found.live(1).any()
    assert len(found.levels) == 2


def test_save_and_load_round_trip(collab, tmp_path):
    collab.save(tmp_path / "c")
    again = load_collaboration(tmp_path / "c")
    assert repr(again) == repr(collab)
    assert again.history == collab.history
    assert again.settings == collab.settings
    assert (again.layers, again.n_experts) == (collab.layers, collab.n_experts)
    for one, two in zip(again.levels, collab.levels, strict=True):
        for name in ("atoms", "usage", "peak"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(again.levels[1].links, collab.levels[1].links)
    np.testing.assert_array_equal(again.codes.value, collab.codes.value)
    with pytest.raises(OutputExistsError):
        collab.save(tmp_path / "c")
    again.save(tmp_path / "d")
    for file in sorted((tmp_path / "c").iterdir()):
        assert file.read_bytes() == (tmp_path / "d" / file.name).read_bytes()
    again.save(tmp_path / "c", overwrite=True)


def test_pickle_keeps_everything(collab):
    again = pickle.loads(pickle.dumps(collab))
    assert repr(again) == repr(collab)
    np.testing.assert_array_equal(again.levels[0].atoms, collab.levels[0].atoms)
    assert pickle.loads(pickle.dumps(HSDL(seed=3))) == HSDL(seed=3)


@pytest.mark.parametrize("name", ["atoms.safetensors", "codes.safetensors", "history.json"])
def test_a_damaged_file_is_told(collab, tmp_path, name):
    collab.save(tmp_path / "c")
    file = tmp_path / "c" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=name):
        load_collaboration(tmp_path / "c")
    file.unlink()
    with pytest.raises(DataError, match=name):
        load_collaboration(tmp_path / "c")


def test_wrong_shapes_types_and_versions_are_told(collab, tmp_path):
    from safetensors.numpy import load_file, save_file

    collab.save(tmp_path / "c")
    file = tmp_path / "c" / "atoms.safetensors"
    arrays = load_file(file)
    for name, value, said in [
        ("level1.atoms", arrays["level1.atoms"][:, 1:], "level1.atoms as float32"),
        ("level2.usage", arrays["level2.usage"].astype(np.float32), "level2.usage as float32"),
        ("level1.peak", np.full_like(arrays["level1.peak"], np.nan), "not finite"),
    ]:
        save_file(arrays | {name: np.ascontiguousarray(value)}, file)
        with pytest.raises(DataError, match=said):
            load_collaboration(tmp_path / "c")
    save_file({name: array for name, array in arrays.items() if name != "level2.links"}, file)
    with pytest.raises(SchemaError, match=r"lacks level2\.links"):
        load_collaboration(tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(SchemaError, match="collaboration version 99"):
        load_collaboration(tmp_path / "c")
    with pytest.raises(DataError, match="holds no collaboration"):
        load_collaboration(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("atoms", ()),
        ("atoms", (4, 0)),
        ("atoms", (2.5,)),
        ("atoms", 16),
        ("dictionary_size", -1),
        ("sparsity", -0.1),
        ("sparsity", "much"),
        ("reconstruction", 0.0),
        ("reconstruction", float("inf")),
        ("tolerance", float("nan")),
        ("copies", "yes"),
        ("rows", "word"),
        ("weights", "heavy"),
        ("max_iterations", 0),
        ("seed", -1),
        ("n_init", 0),
        ("threads", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(SettingsError, match=f"^{name} is"):
        HSDL(**{name: value})


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        HSDL().fit(as_rows(np.zeros((0, 6), np.float32)))


def test_negative_values_are_refused():
    rows = as_rows(np.ones((4, 6), np.float32))
    rows.values[3] = -1
    with pytest.raises(DataError, match="values holds -1 at position 3"):
        HSDL(atoms=(2,)).fit(rows)


def test_members_links_and_explain(collab):
    members = collab.members(1, 0)
    assert members
    assert all(layer == 0 and 0 <= expert < 96 and s >= 0.5 for layer, expert, s in members)
    assert len(collab.members(1, 0, threshold=0.0)) >= len(members)
    for level, atom, part in collab.links(1, 0):
        assert level == 2
        assert collab.levels[1].links[0, atom] == pytest.approx(part)
    text = collab.explain(1, 0)
    assert "of all use" in text
    assert "made of level 2" in text
    assert "part of level 1" in collab.explain(2, 0)
    for level in (0, 3):
        with pytest.raises(SettingsError, match="level is"):
            collab.members(level, 0)
    with pytest.raises(SettingsError, match="atom is 40"):
        collab.explain(1, 40)


def test_repr_says_what_matters(collab):
    text = repr(collab)
    assert "level 1: " in text
    assert "400 rows × 96 sites" in text
    assert "stopped by tolerance" in text


def test_without_a_price_of_size_more_atoms_live_at_no_larger_error():
    """Claim A4: it is the row maxima that switch atoms off."""
    x, _ = planted(n_rows=400, noise=0.01, seed=3)
    settings = {"atoms": (64,), "sparsity": 0.1, "reconstruction": 10.0, "threads": 1}
    paid, free = (HSDL(dictionary_size=s, **settings).fit(as_rows(x)) for s in (1.0, 0.0))
    assert free.live(1).sum() > paid.live(1).sum()
    assert free.history[-1]["reconstruction"] <= paid.history[-1]["reconstruction"]
    parts = free.history[-1]
    assert parts["total"] == pytest.approx(0.1 * parts["sparsity"] + 10 * parts["reconstruction"])
