"""Evaluations that were stopped go on, and only as what they were."""

import pytest

import models
from moecollab.evaluation import parts
from moecollab.evaluation.evaluation import evaluate
from moecollab.evaluation.subject import digest_tokenizer
from moecollab.models.masking import amplify
from moecollab.record.corpus import read_corpus
from test_tasks import write_task

TEXTS = ["The owl hunts at night, and sleeps by day.", "Habeas corpus is a writ."]


@pytest.fixture
def model():
    return models.build("qwen2_moe")


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


@pytest.fixture
def stopped(monkeypatch):
    """An evaluation that is stopped while it measures speed."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    def run(*given, **asked):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "measure_usage", stop)
            with pytest.raises(KeyboardInterrupt):
                evaluate(*given, **asked, speed=True)

    return run


class Shifted:
    """A tokenizer with another's tokens that reads text as its neighbours."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, **options):
        ids = self.inner(text, **options)["input_ids"]
        return {"input_ids": [token ^ 1 for token in ids]}


def test_a_model_is_not_gone_on_with_as_another(model, tokenizer, stopped, tmp_path):
    """Gains are on the model though they are not what is handed over."""
    asked = {"tokenizer": tokenizer, "corpus": TEXTS}
    true = evaluate(model, **asked).loss
    with amplify(model, {(0, expert): 0.0 for expert in range(8)}):
        stopped(model, **asked, out=tmp_path / "e.json")
        assert evaluate(model, **asked).loss != true
    assert evaluate(model, **asked, out=tmp_path / "e.json", speed=True).loss == true


def test_a_tokenizer_is_not_gone_on_with_as_another(model, tokenizer, stopped, tmp_path):
    asked = {"corpus": TEXTS, "out": tmp_path / "e.json"}
    true = evaluate(model, tokenizer=tokenizer, corpus=TEXTS).loss
    stopped(model, **asked, tokenizer=Shifted(tokenizer))
    assert evaluate(model, **asked, tokenizer=tokenizer, speed=True).loss == true


def test_a_tokenizers_digest_is_of_what_it_does(tokenizer):
    corpus, other = read_corpus(TEXTS), models.build_tokenizer()
    assert digest_tokenizer(tokenizer, corpus) == digest_tokenizer(other, corpus)
    other.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    read = {digest_tokenizer(one, None) for one in (tokenizer, other)}
    assert len(read) == 2
    digest_tokenizer(lambda text, **_: {"input_ids": [1, len(text)]}, corpus)  # any callable


def test_a_stopped_run_does_not_stumble_over_its_log(model, tokenizer, stopped, tmp_path):
    write_task(tmp_path / "yaml", tmp_path / "cache")
    asked = {"tokenizer": tokenizer, "tasks": ["five"], "task_folder": tmp_path / "yaml"}
    log = tmp_path / "log.jsonl"
    stopped(model, **asked, out=tmp_path / "e.json", samples=log)
    assert not log.exists()
    evaluate(model, **asked, out=tmp_path / "e.json", samples=log, speed=True)
    evaluate(model, **asked, samples=tmp_path / "whole.jsonl")
    assert len(log.read_text().splitlines()) == 5  # questions
    assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
