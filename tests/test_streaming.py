"""Fits of more tokens than are held in memory."""

import numpy as np
import pytest

from moecollab.errors import ConvergenceWarning, SettingsError, StaleInputError
from moecollab.patterns import streaming
from moecollab.patterns.dictionary import HSDL, load_collaboration
from planted import dense_codes
from reference import objective

SETTINGS = {"atoms": (6, 9), "sparsity": 5.0, "reconstruction": 80.0, "threads": 1}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 60)


@pytest.fixture
def hsdl():
    return HSDL(**SETTINGS, rows_in_memory=150)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_are_the_rows(acts):
    whole = acts.rows("token")
    blocks = list(acts.token_blocks(size=100))
    assert [block.n_rows for block in blocks] == [100, 100, 100, 67]
    joined = type(whole).join(blocks)
    for name in ("indptr", "sites", "values", "sample"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
    with pytest.raises(SettingsError, match="size is 0"):
        next(acts.token_blocks(size=0))


def test_objective_codes_and_use_are_those_of_all_rows(acts, hsdl):
    found = hsdl.fit(acts)
    assert found.n_rows == acts.n_tokens == 367
    codes = dense_codes(found.codes, 6)
    atoms = [level.atoms for level in found.levels]
    links = found.levels[1].links
    usage = [np.ones(found.n_rows), codes.sum(axis=0, dtype=float)]
    x = acts.rows("token").dense()
    parts = objective(x, atoms, [codes, links], 5.0, 80.0, usage=usage)
    last = found.history[-1]
    names = ("dictionary_size", "sparsity", "reconstruction", "total")
    expected = parts[0] - codes.max(axis=0).sum() + found.levels[0].peak.sum(), *parts[1:]
    assert [last[name] for name in names] == pytest.approx(expected, rel=1e-5)
    assert found.levels[0].usage == pytest.approx(usage[1], rel=1e-5)
    assert found.levels[0].peak == pytest.approx(codes.max(axis=0))
    assert found.levels[1].usage == pytest.approx(usage[1] @ links, rel=1e-5)
    for level in found.levels:
        assert (np.diff(level.usage) <= 0).all()
    for start, stop in zip(found.codes.indptr[:-1], found.codes.indptr[1:], strict=True):
        assert (np.diff(found.codes.atom[start:stop].astype(int)) > 0).all()
    assert (found.layers, found.n_experts) == (acts.layers, acts.n_experts)
    assert found.activations == acts.digest()
    assert found.history[0]["stage"] == "sample, level 1"


def test_a_stopped_fit_goes_on_to_the_same_bytes(acts, hsdl, tmp_path, monkeypatch):
    hsdl.fit(acts, checkpoint=tmp_path / "whole").save(tmp_path / "a")
    pack, done = streaming._pack, []

    def stop_at_the_third(*arguments):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return pack(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_pack", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            hsdl.fit(acts, checkpoint=tmp_path / "stopped")
        with patch.context() as inner:
            inner.setattr(HSDL, "_run", None)  # the sample is not fitted again
            done[:] = [1] * 3
            hsdl.fit(acts, checkpoint=tmp_path / "stopped").save(tmp_path / "b")
    assert len(done) == 3 + 7 - 2
    assert files(tmp_path / "a") == files(tmp_path / "b")
    loaded = load_collaboration(tmp_path / "b")
    assert isinstance(loaded.codes.value, np.memmap)


def test_a_checkpoint_of_another_run_is_refused(acts, hsdl, tmp_path):
    hsdl.fit(acts, checkpoint=tmp_path / "c")
    with pytest.raises(StaleInputError, match="other settings"):
        HSDL(**SETTINGS, rows_in_memory=160).fit(acts, checkpoint=tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(StaleInputError, match="not empty"):
        hsdl.fit(acts, checkpoint=tmp_path / "mine")


def test_threads_change_nothing(acts, hsdl):
    one, three = hsdl.fit(acts), HSDL(**SETTINGS | {"threads": 3}, rows_in_memory=150).fit(acts)
    assert one.history == three.history
    assert np.array_equal(one.codes.value, three.codes.value)


def test_ctrl_c_in_the_sample_gives_the_best_so_far(acts, hsdl, monkeypatch, tmp_path):
    from moecollab.patterns import dictionary

    class Bar:
        def advance(self, steps=1):
            pass

        def remark(self, text):
            raise KeyboardInterrupt

    class Track:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return Bar()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(dictionary, "track", Track)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        found = hsdl.fit(acts, checkpoint=tmp_path / "c")
    assert (found.n_rows, found.layers) == (150, acts.layers)
    assert not (tmp_path / "c" / "sample").exists()
