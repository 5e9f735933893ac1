"""The Rust core through its boundary, against slow twins."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moecollab
from adam_twin import AdamTwin
from moecollab import _core
from moecollab.errors import DataError, SettingsError, ShapeError
from planted import SHORT_FIT, as_rows, planted
from reference import caep as slow_caep
from reference import objective


def fit(x, watch=lambda row: None, **changes):
    rows = as_rows(x)
    arrays = (rows.indptr, rows.sites, rows.values)
    return _core.fit_dictionary(arrays, x.shape[1], SHORT_FIT | changes, watch)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 20), st.floats(0.01, 1.0))
def test_caep_equals_its_loop(seed, n_atoms, n_sites, fraction):
    rng = np.random.default_rng(seed)
    # Quarters add up exactly, so that order of summation cannot matter.
    atoms = (rng.integers(0, 5, (n_atoms, n_sites)) / 4).astype(np.float32)
    usage = rng.integers(0, 6, n_atoms).astype(np.float64)
    peak = rng.choice([0.0, 0.01, 0.5, 1.0], n_atoms)
    step, contribution = slow_caep(atoms.astype(np.float64), usage, peak, fraction)
    found = _core.caep_ranking(atoms, usage, peak, fraction)
    assert found["step"].dtype == np.int64
    assert found["step"].tolist() == step.tolist()
    assert found["contribution"].tolist() == contribution.tolist()


def test_caep_refuses_what_does_not_fit():
    atoms, ones = np.ones((2, 3), np.float32), np.ones(2)
    with pytest.raises(ShapeError, match="atoms is float64; pass a numpy array of float32"):
        _core.caep_ranking(atoms.astype(np.float64), ones, ones, 0.5)
    with pytest.raises(ShapeError, match="atoms is not C-contiguous"):
        _core.caep_ranking(np.asfortranarray(atoms), ones, ones, 0.5)
    with pytest.raises(ShapeError, match=r"atoms has shape \[3\]; pass an array with 2 axes"):
        _core.caep_ranking(atoms[0], ones, ones, 0.5)
    with pytest.raises(ShapeError, match="peak has length 1, expected 2"):
        _core.caep_ranking(atoms, ones, ones[:1], 0.5)
    with pytest.raises(ShapeError, match="usage is a list; pass a numpy array of float64"):
        _core.caep_ranking(atoms, [1.0, 1.0], ones, 0.5)
    with pytest.raises(SettingsError, match=r"threshold_fraction is '1\.5'"):
        _core.caep_ranking(atoms, ones, ones, 1.5)
    with pytest.raises(DataError, match="usage holds NaN at position 1"):
        _core.caep_ranking(atoms, np.array([1.0, np.nan]), ones, 0.5)
    with pytest.raises(DataError, match="atoms is empty"):
        _core.caep_ranking(atoms[:0], ones[:0], ones[:0], 0.5)


def test_an_exception_while_watching_is_passed_on():
    x, _ = planted(n_rows=50)

    def fail(row):
        raise RuntimeError("no room on the screen")

    with pytest.raises(RuntimeError, match="no room on the screen"):
        fit(x, fail)


def test_the_watcher_sees_the_history():
    x, _ = planted(n_rows=50)
    seen = []
    found = fit(x, seen.append)
    assert seen == found["history"][:-1]
    assert found["history"][-1]["stage"] == "final"


def test_stub_names_what_the_module_holds():
    stub = Path(moecollab.__file__).with_name("_core.pyi")
    names = {
        node.name for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert names == {name for name in dir(_core) if not name.startswith("_")}


def test_adam_twin_resumes_where_it_was(tmp_path):
    """The reference itself: its objective is the formula's, and a stopped run goes on."""
    x, _ = planted(n_rows=40, n_layers=3, n_experts=4, seed=1)
    settings = (torch.from_numpy(x), (6, 8), 0.5, 30.0, 60)
    whole = AdamTwin(*settings)
    best = whole.fit()
    codes = [level[1].detach().numpy() for level in whole.levels]
    atoms = [torch.sigmoid(level[0]).detach().numpy() for level in whole.levels]
    assert whole._loss().item() == pytest.approx(objective(x, atoms, codes, 0.5, 30.0)[3], rel=1e-4)
    stopped = AdamTwin(*settings, checkpoint=tmp_path / "twin.pt")

    def stop(stage, epoch, *_):
        if (stage, epoch) == (1, 55):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.fit(stop)
    resumed = AdamTwin(*settings, checkpoint=tmp_path / "twin.pt")
    assert resumed.fit() == best
    assert [row[:2] for row in resumed.trace] == [row[:2] for row in whole.trace]
