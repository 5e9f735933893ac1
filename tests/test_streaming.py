"""Fits of more tokens than are held in memory."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from moecollab.errors import ConvergenceWarning, SettingsError, StaleInputError
from moecollab.patterns import blocks, streaming
from moecollab.patterns.dictionary import HSDL, load_collaboration
from planted import dense_codes

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


def twin_terms(x, found):
    """The three terms over all levels in the solver's scale, in float64."""
    codes = dense_codes(found.codes, len(found.levels[0].atoms)).astype(float)
    atoms = [level.atoms.astype(float) for level in found.levels]
    parts = [codes, *(level.links.astype(float) for level in found.levels[1:])]
    if found.settings["loss"] == "l2":
        long = [np.linalg.norm(each, axis=1) for each in atoms]
        long = [np.where(each > 0, each, 1.0) for each in long]
        for at, each in enumerate(parts):
            parts[at] = each * long[at] / (long[at - 1][:, None] if at else 1.0)
        atoms = [each / length[:, None] for each, length in zip(atoms, long, strict=True)]
    target, weight, terms = x.astype(float), np.full(len(x), 1 / len(x)), np.zeros(3)
    for own, code in zip(atoms, parts, strict=True):
        rest = target - code @ own
        squared = found.settings["loss"] == "l2"
        error = 0.5 * (rest**2).sum(axis=1) if squared else np.abs(rest).sum(axis=1)
        terms += code.max(axis=0).sum(), weight @ code.sum(axis=1), weight @ error
        target, weight = own, code.sum(axis=0) / len(code)
    return terms


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("atoms", [(6,), (6, 9), (6, 9, 7), (6, 4, 8, 5)])
def test_any_number_of_levels_has_the_objective_of_the_formula(loss, atoms, acts):
    settings = {"sparsity": 5.0, "reconstruction": 80.0, "threads": 1, "loss": loss}
    x = acts.rows("token").dense()
    for held in (150, 400):
        found = HSDL(atoms=atoms, rows_in_memory=held, **settings).fit(acts)
        last, terms = found.history[-1], twin_terms(x, found)
        names = ("dictionary_size", "sparsity", "reconstruction")
        assert [last[name] for name in names] == pytest.approx(terms, rel=1e-5, abs=1e-8)
        assert last["total"] == pytest.approx(terms @ (1.0, 5.0, 80.0), rel=1e-5)
        usage = dense_codes(found.codes, atoms[0]).sum(axis=0, dtype=float)
        for level in found.levels[1:]:
            usage = usage @ level.links
            assert level.usage == pytest.approx(usage, rel=1e-4)


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


@pytest.mark.parametrize("cut", [lambda data: data[:20], lambda data: data[:-40] + bytes(40)])
def test_damage_is_named(cut, acts, hsdl, tmp_path):
    hsdl.fit(acts, checkpoint=tmp_path / "c")
    sums = next((tmp_path / "c").rglob("sums.safetensors"))
    sums.write_bytes(cut(sums.read_bytes()))
    with pytest.raises(StaleInputError, match=r"sums\.safetensors is damaged; delete it"):
        hsdl.fit(acts, checkpoint=tmp_path / "c")
    sample = next((tmp_path / "c").rglob("sample"))
    (sample / "atoms.safetensors").unlink()
    with pytest.raises(StaleInputError, match="sample is damaged; delete it"):
        hsdl.fit(acts, checkpoint=tmp_path / "c")


def test_an_earlier_result_outlives_its_checkpoint(acts, hsdl, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            first = hsdl.fit(acts, checkpoint=tmp_path / "c")
    before = np.array(first.codes.value)
    hsdl.fit(acts, checkpoint=tmp_path / "c")
    assert np.array_equal(first.codes.value, before)
    first.save(tmp_path / "first")
    assert np.array_equal(load_collaboration(tmp_path / "first").codes.value, before)


def test_a_limit_in_the_passes_is_told(acts, hsdl):
    with pytest.warns(ConvergenceWarning, match="max iterations"):
        found = replace(hsdl, max_iterations=1).fit(acts)
    assert found.stop_reason == "max iterations"
    assert len(found.levels) == 2


def test_fewer_rows_in_memory_than_atoms_are_refused(acts, hsdl):
    with pytest.raises(SettingsError, match="rows_in_memory is 5; it must be at least 6"):
        replace(hsdl, rows_in_memory=5).fit(acts)


def test_a_stopped_fit_transform_has_all_rows(acts, hsdl, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            assert hsdl.fit_transform(acts).shape == (367, 6)


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
