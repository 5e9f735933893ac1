"""Held-out loss against a slow twin, what is kept of it, files."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from moecollab.errors import (
    DataError,
    MissingInputError,
    OutputExistsError,
    SchemaError,
    SettingsError,
)
from moecollab.evaluation.evaluation import evaluate, load_evaluation
from moecollab.evaluation.perplexity import HeldOut, cut, document_losses
from moecollab.models.masking import mask
from moecollab.record.corpus import read_corpus

TEXTS = [
    {"id": "a", "text": "The court held that the contract was void.", "domain": "law"},
    {"id": "b", "text": "x", "domain": "law"},
    {"id": "c", "text": "Let f be a continuous function on [0, 1]. " * 4, "domain": "maths"},
    {"id": "d", "text": "2 + 2 = 4", "domain": "maths"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny():
    return models.build("qwen2_moe")


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


@pytest.fixture(scope="module")
def measured(folder):
    return evaluate(folder, corpus=TEXTS, context=32, batch_size=4)


class Bigram:
    """A model whose logits depend on the last token alone."""

    device = torch.device("cpu")
    training = True

    def __init__(self, table):
        self.table = table
        self.config = SimpleNamespace(max_position_embeddings=64)

    def __call__(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False


def slow_loss(model, ids, context):
    """Loss of one document, window by window and token by token."""
    total = 0.0
    for window in cut(0, ids, context):
        tokens = torch.tensor([window.ids])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].double()
        for place in range(len(window.ids) - 1):
            total -= float(logits[place].log_softmax(-1)[window.ids[place + 1]])
    return total


def test_every_token_but_the_first_is_predicted_once():
    for length in range(12):
        ids = list(range(length))
        predicted = [token for window in cut(0, ids, context=4) for token in window.ids[1:]]
        assert predicted == ids[1:]


def test_loss_equals_the_slow_twin(tiny, tokenizer):
    corpus = read_corpus(TEXTS)
    text = HeldOut.read(tokenizer, corpus, 20)
    found, skipped = document_losses(tiny, text, batch_size=3), text.skipped
    assert skipped == 1
    assert found["document"].to_list() == ["a", "c", "d"]
    for row in found.iter_rows(named=True):
        text = next(entry["text"] for entry in TEXTS if entry["id"] == row["document"])
        ids = tokenizer(text)["input_ids"]
        assert row["tokens"] == len(ids) - 1
        assert row["nll"] == pytest.approx(slow_loss(tiny, ids, 20), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_batch_size_changes_only_rounding(tiny, tokenizer, batch_size):
    corpus = read_corpus(TEXTS)
    one, other = (
        document_losses(tiny, HeldOut.read(tokenizer, corpus, 16), batch_size=size)
        for size in (3, batch_size)
    )
    np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-5)


def test_loss_is_deterministic(folder, measured):
    again = evaluate(folder, corpus=TEXTS, context=32, batch_size=4)
    assert again.documents.equals(measured.documents)
    assert again.as_json() == measured.as_json()


def test_hand_computed_loss(tokenizer):
    """P(b | a) = 1/4 and P(a | b) = 1/2 give "abab" a loss of ln 4 + ln 2 + ln 4 = 5 ln 2."""
    a, b = tokenizer("ab")["input_ids"]
    table = torch.full((models.VOCABULARY, models.VOCABULARY), -torch.inf)
    table[a, b], table[a, a] = math.log(1 / 4), math.log(3 / 4)
    table[b, a], table[b, b] = math.log(1 / 2), math.log(1 / 2)
    model = Bigram(table)
    text = HeldOut.read(tokenizer, read_corpus(["abab", "aa"]), 3)
    found = document_losses(model, text, batch_size=2)
    np.testing.assert_allclose(found["nll"], [5 * math.log(2), math.log(4 / 3)], rtol=1e-6)
    assert found["tokens"].to_list() == [3, 1]
    assert model.training


def test_a_loss_that_is_not_finite_names_the_document(tokenizer):
    model = Bigram(torch.full((models.VOCABULARY,) * 2, math.nan))
    with pytest.raises(DataError, match="loss on document '1' is nan; look for NaN"):
        document_losses(model, HeldOut.read(tokenizer, read_corpus(["abab"]), 3), batch_size=2)


def test_a_corpus_of_single_tokens_measures_nothing(folder):
    with pytest.raises(DataError, match="no document of the corpus has two tokens"):
        evaluate(folder, corpus=["x", "y"])


def test_evaluation_sums_up(measured, folder):
    table = measured.documents
    assert measured.loss == table["nll"].sum() / table["tokens"].sum()
    assert measured.perplexity == math.exp(measured.loss)
    assert list(measured.by_domain) == ["law", "maths"]
    maths = table.filter(table["domain"] == "maths")
    assert measured.by_domain["maths"] == maths["nll"].sum() / maths["tokens"].sum()
    assert measured.domain_table["documents"].to_list() == [1, 2]
    assert measured.domain_table.row(0)[-2:] == (None, None)  # one document has no interval
    low, high = measured.interval
    assert low <= measured.loss <= high
    assert (measured.name, measured.model, measured.skipped) == ("tiny", str(folder), 1)
    assert repr(measured).startswith(f"Evaluation(tiny: loss {measured.loss:.4f} [")


def test_context_is_what_the_model_takes_at_most(folder, measured):
    assert measured.about["settings"]["context"] == 32
    found = evaluate(folder, corpus=TEXTS)
    assert found.about["settings"]["context"] == 64


def test_file_is_complete(measured, tmp_path):
    path = tmp_path / "evaluation.json"
    measured.save(path)
    found = load_evaluation(path)
    assert found.documents.equals(measured.documents)
    assert found.loss == measured.loss
    assert found.as_json() == measured.as_json()
    raw = json.loads(path.read_text())
    assert path.read_text() == json.dumps(raw, sort_keys=True, indent=1) + "\n"
    assert set(raw["inputs"]) == {"model", "base", "tokenizer", "corpus"}
    assert {"torch", "transformers", "lm-eval", "moecollab"} <= set(raw["versions"])
    with pytest.raises(OutputExistsError, match="exists"):
        measured.save(path)


def test_damaged_files(measured, tmp_path):
    path = tmp_path / "evaluation.json"
    measured.save(path)
    good = json.loads(path.read_text())
    columns = good["documents"]
    for change, error, message in [
        ({"kind": "plan"}, SchemaError, "expected evaluation version 1"),
        ({"documents": {"document": ["a"]}}, DataError, "not a whole evaluation"),
        ({"documents": {key: [] for key in columns}}, DataError, "without tokens or loss"),
        ({"documents": columns | {"nll": [1.0, 2.0, None]}}, DataError, "without tokens or loss"),
        ({"documents": columns | {"tokens": [0, 1, 2]}}, DataError, "without tokens or loss"),
        ({"documents": columns | {"nll": ["x", "y", "z"]}}, DataError, "not a whole evaluation"),
        ({"skipped": None}, DataError, "not a whole evaluation"),
        ({"tasks": [{"task": "five"}]}, DataError, "not a whole evaluation"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(error, match=message):
            load_evaluation(path)


def test_output_is_refused_before_any_work(tmp_path):
    path = tmp_path / "there.json"
    path.write_text("{}")
    with pytest.raises(OutputExistsError, match="exists"):
        evaluate("no/such/model", corpus=["some text"], out=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"context": 1}, "context is 1; it must be at least 2"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        evaluate("no/such/model", corpus=["some text"], **settings)


def test_something_must_be_measured():
    with pytest.raises(MissingInputError, match="give a corpus, tasks or both"):
        evaluate("no/such/model")


def test_a_loaded_model_needs_a_tokenizer(tiny, tokenizer, measured):
    with pytest.raises(MissingInputError, match="comes without a tokenizer; pass tokenizer="):
        evaluate(tiny, corpus=TEXTS)
    found = evaluate(tiny, tokenizer=tokenizer, corpus=TEXTS, context=32, batch_size=4)
    assert found.documents.equals(measured.documents)
    assert found.name == "Qwen2MoeForCausalLM"


def test_no_loss_without_a_corpus(measured):
    bare = type(measured)(name="bare", model="m")
    with pytest.raises(MissingInputError, match="'bare' has no loss; evaluate again with a corpus"):
        _ = bare.loss
    assert repr(bare) == "Evaluation(bare: nothing measured)"


def test_masked_models_carry_their_plan(folder, measured, tmp_path):
    n = models.N_EXPERTS
    keep = {layer: tuple(range(layer, n)) for layer in range(3)}
    plan = SimpleNamespace(keep=keep, n_experts=n, top_k=models.TOP_K)
    with mask(str(folder), plan, out=tmp_path / "masked") as held:
        inside = evaluate(held, corpus=TEXTS, context=32, batch_size=4, name="held")
    outside = evaluate(tmp_path / "masked", corpus=TEXTS, context=32, batch_size=4)
    assert outside.documents.equals(inside.documents)
    assert outside.plan == inside.plan
    assert outside.plan["keep"]["2"] == list(range(2, n))
    assert outside.loss != measured.loss
    assert measured.plan is None
    assert outside.about["inputs"]["model"] != measured.about["inputs"]["model"]
