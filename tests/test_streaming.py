"""Fits of more tokens than are held in memory."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from moecollab.errors import ConvergenceWarning, SettingsError, StaleInputError
from moecollab.patterns import blocks, streaming
from moecollab.patterns.dictionary import HSDL, load_collaboration
from planted import dense_codes
from reference import objective

SETTINGS = {"atoms": (6, 9), "sparsity": 5.0, "reconstruction": 80.0, "threads": 1}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 60)


@pytest.fixture(params=["l1", "l2"])
def hsdl(request):
    return HSDL(**SETTINGS, loss=request.param, rows_in_memory=150)


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


def own_terms(acts, found):
    """Dictionary size, sparsity and reconstruction of a squared-error fit in its solver's scale."""
    first, second = found.levels
    norms = [np.linalg.norm(level.atoms.astype(float), axis=1) for level in found.levels]
    long, fine = (np.where(norm > 0, norm, 1.0) for norm in norms)
    codes = dense_codes(found.codes, 6) * long
    links, use = second.links * fine / long[:, None], codes.mean(axis=0)
    rest = acts.rows("token").dense() - codes @ (first.atoms / long[:, None])
    below = first.atoms / long[:, None] - links @ (second.atoms / fine[:, None])
    return (
        codes.max(axis=0).sum() + links.max(axis=0).sum(),
        codes.sum(axis=1).mean() + use @ links.sum(axis=1),
        0.5 * ((rest**2).sum(axis=1).mean() + use @ (below**2).sum(axis=1)),
    )


def test_objective_is_that_of_all_rows(acts, hsdl):
    found = hsdl.fit(acts)
    assert found.n_rows == acts.n_tokens == 367
    codes = dense_codes(found.codes, 6)
    if hsdl.loss == "l1":
        atoms = [level.atoms for level in found.levels]
        usage = [np.ones(found.n_rows), codes.sum(axis=0, dtype=float)]
        x = acts.rows("token").dense()
        parts = objective(x, atoms, [codes, found.levels[1].links], 5.0, 80.0, usage=usage)[:3]
    else:
        parts = own_terms(acts, found)
    last = found.history[-1]
    names = ("dictionary_size", "sparsity", "reconstruction", "total")
    expected = *parts, parts[0] + 5.0 * parts[1] + 80.0 * parts[2]
    assert [last[name] for name in names] == pytest.approx(expected, rel=1e-5)


def test_codes_and_use_are_those_of_all_rows(acts, hsdl):
    found = hsdl.fit(acts)
    codes = dense_codes(found.codes, 6)
    use = codes.sum(axis=0, dtype=float)
    assert found.levels[0].usage == pytest.approx(use, rel=1e-5)
    assert found.levels[0].peak == pytest.approx(codes.max(axis=0))
    assert found.levels[1].usage == pytest.approx(use @ found.levels[1].links, rel=1e-5)
    for level in found.levels:
        assert (np.diff(level.usage) <= 0).all()
    for start, stop in zip(found.codes.indptr[:-1], found.codes.indptr[1:], strict=True):
        assert (np.diff(found.codes.atom[start:stop].astype(int)) > 0).all()
    assert (found.layers, found.n_experts) == (acts.layers, acts.n_experts)
    assert found.activations == acts.digest()


def test_every_pass_is_better_than_the_one_before(acts, hsdl):
    found = hsdl.fit(acts)
    passes = [row for row in found.history if "all rows" in row["stage"]]
    assert len(passes) > 2
    for one, two in pairwise(passes):
        if one["stage"] == two["stage"]:
            assert two["total"] < one["total"]
    assert found.history[-1]["total"] == passes[-1]["total"] == found.objective
    assert found.history[0]["stage"].startswith("sample, ")


def test_passes_reach_what_a_fit_of_all_rows_reaches(acts, hsdl):
    sampled = [row for row in hsdl.fit(acts).history if "all rows" in row["stage"]]
    whole = HSDL(**SETTINGS, loss=hsdl.loss).fit(acts)
    first, last = sampled[0]["total"], sampled[-1]["total"]
    assert last < 1.03 * whole.objective
    if hsdl.loss == "l2":
        assert last < first


def stop_at(monkeypatch, number):
    """Ctrl-C when that many blocks have been done; returns the list that counts them."""
    share, done = blocks.Blocks._share, []

    def counted(*arguments):
        done.append(1)
        if len(done) == number:
            raise KeyboardInterrupt
        return share(*arguments)

    monkeypatch.setattr(blocks.Blocks, "_share", counted)
    return done


@pytest.mark.parametrize("at", [3, 9])
def test_a_stopped_fit_goes_on_to_the_same_bytes(at, acts, hsdl, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        done = stop_at(patch, -1)
        hsdl.fit(acts, checkpoint=tmp_path / "whole").save(tmp_path / "a")
        everything = len(done)
    with monkeypatch.context() as patch:
        done = stop_at(patch, at)
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            first = hsdl.fit(acts, checkpoint=tmp_path / "stopped")
        assert first.n_rows == (150 if at == 3 else 367)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_draw", None if hsdl.loss == "l2" else streaming._draw)
        done = stop_at(patch, -1)
        hsdl.fit(acts, checkpoint=tmp_path / "stopped").save(tmp_path / "b")
    assert len(done) == everything - at + 1
    assert files(tmp_path / "a") == files(tmp_path / "b")
    loaded = load_collaboration(tmp_path / "b")
    assert isinstance(loaded.codes.value, np.memmap)


def test_a_checkpoint_of_another_run_is_refused(acts, hsdl, tmp_path):
    hsdl.fit(acts, checkpoint=tmp_path / "c")
    with pytest.raises(StaleInputError, match="other settings"):
        replace(hsdl, rows_in_memory=160).fit(acts, checkpoint=tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(StaleInputError, match="not empty"):
        hsdl.fit(acts, checkpoint=tmp_path / "mine")


def test_a_damaged_block_is_named(acts, hsdl, tmp_path):
    hsdl.fit(acts, checkpoint=tmp_path / "c")
    sums = next((tmp_path / "c").rglob("sums.safetensors"))
    sums.write_bytes(sums.read_bytes()[:20])
    with pytest.raises(StaleInputError, match="is damaged; delete it"):
        hsdl.fit(acts, checkpoint=tmp_path / "c")


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
    assert not list((tmp_path / "c").rglob("sample"))
