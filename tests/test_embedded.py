"""Every verb that takes a model takes the embedded one by its name."""

import inspect

import numpy as np
import pytest

import moecollab as mc
from moecollab import embedded
from moecollab.errors import DataError
from scored import make_scores

SCORES = make_scores(np.arange(8.0).reshape(2, 4), top_k=2)
TEXTS = ["the owl hunts", "the court held", "the fox jumps"]
CALLS = {
    "amplify": lambda model, out: mc.amplify(model, {}),
    "compare": lambda model, out: mc.compare(model, TEXTS[:2], TEXTS[2:], out=out),
    "evaluate": lambda model, out: mc.evaluate(model, corpus=TEXTS),
    "extract": lambda model, out: mc.extract(model, TEXTS, out=out),
    "iterate": lambda model, out: mc.iterate(model, TEXTS, "reap", drop=0.5, out=out),
    "load_model": lambda model, out: mc.load_model(model),
    "mask": lambda model, out: mc.mask(model, mc.plan(SCORES, drop=0.5), out=out),
    "merge": lambda model, out: mc.merge(model, mc.plan(SCORES, drop=0.5), corpus=TEXTS),
    "plan": lambda model, out: mc.plan(SCORES, memory_gb=1, model=model),
    "prune": lambda model, out: mc.prune(model, mc.plan(SCORES, drop=0.5), out=out),
    "repair": lambda model, out: mc.repair(model, TEXTS, plan=mc.plan(SCORES, drop=0.5)),
    "score": lambda model, out: mc.score("aimer", model=model),
}


def test_every_verb_with_a_model_is_called():
    verbs = {name for name in mc.__all__ if inspect.isfunction(getattr(mc, name))}
    assert CALLS.keys() == {
        name for name in verbs if "model" in inspect.signature(getattr(mc, name)).parameters
    }


@pytest.mark.parametrize("verb", CALLS)
def test_the_name_stands_for_the_folder(verb, tmp_path, monkeypatch):
    """Which is put elsewhere, so that it is missed there and nothing runs for long."""
    monkeypatch.setattr(embedded, "MODEL", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="elsewhere does not exist"):
        CALLS[verb]("embedded", tmp_path / "out")


def test_a_teacher_has_a_name_too(tmp_path, monkeypatch, model_folder):
    monkeypatch.setattr(embedded, "MODEL", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="elsewhere does not exist"):
        mc.repair(model_folder, TEXTS, teacher="embedded")


def test_it_is_scored_and_cut_by_its_name(tmp_path):
    scores = mc.score("router_norm", model="embedded")
    out = mc.prune("embedded", mc.plan(scores, drop=0.5), out=tmp_path / "small")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, embedded.MODEL)]
    assert sizes[0] < 0.7 * sizes[1]
