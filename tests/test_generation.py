"""What models write: against a loop without a cache, whatever their tokenizers and settings."""

import copy

import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from moecollab.errors import DataError, MissingInputError, SettingsError
from moecollab.evaluation.differences import WRITTEN, differences
from moecollab.evaluation.evaluation import evaluate, load_evaluation
from moecollab.evaluation.generation import Prompts, continuations, repetition
from moecollab.manifest import write_json
from moecollab.models.masking import mask
from moecollab.record.corpus import read_corpus

TEXTS = ["The owl hunts at night, and sleeps by day.", "2 + 2 =", "x", "Habeas corpus is a writ."]


@pytest.fixture(scope="module")
def tiny():
    return models.build("qwen2_moe")


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


def slow_greedy(model, ids, tokens, end):
    """The likeliest token each time, everything read anew."""
    ids, start = list(ids), len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            return ids[start:-1]
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_writes_as_the_slow_twin_does(tiny, tokenizer, batch_size):
    prompts = Prompts.read(tokenizer, read_corpus(TEXTS), opening=6)
    found = continuations(tiny, tokenizer, prompts, tokens=20, batch_size=batch_size)
    for ids, row in zip(prompts.ids, found.iter_rows(named=True), strict=True):
        assert row["ids"] == slow_greedy(tiny, ids, 20, 2)
        assert row["text"] == tokenizer.decode(ids)
        assert row["written"] == tokenizer.decode(row["ids"])
    assert found["prompt"].to_list() == ["1", "2", "3", "4"]
    assert found["text"].to_list()[0] == "The ow"


def test_penalties_of_the_model_do_not_hide_repetition(tiny, tokenizer):
    """A checkpoint's own settings may forbid what is to be measured, or end nowhere."""
    model = copy.deepcopy(tiny).train()
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.do_sample, model.generation_config.temperature = True, 3.0
    prompts = Prompts.read(tokenizer, read_corpus(TEXTS))
    found = continuations(model, tokenizer, prompts, tokens=12, batch_size=4)
    assert found.equals(continuations(tiny, tokenizer, prompts, tokens=12, batch_size=4))
    assert model.training


@pytest.mark.parametrize(
    "asked",
    [
        {"suppress_tokens": "first"},
        {"begin_suppress_tokens": "first"},
        {"bad_words_ids": "nested"},
        {"sequence_bias": "biased"},
        {"encoder_repetition_penalty": 50.0},
        {"exponential_decay_length_penalty": (1, 50.0)},
        {"guidance_scale": 3.0},
        {"forced_eos_token_id": 5},
        {"max_time": 1e-9},
        {"stop_strings": ["e", " "]},
        {"min_length": 60, "eos_token_id": "fourth"},
        {"min_new_tokens": 12, "eos_token_id": "fourth"},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_nothing_that_the_model_asks_for_is_added(tiny, tokenizer, asked):
    """All that generate would fill in; only the end of the text is the model's own."""
    prompts = Prompts.read(tokenizer, read_corpus(TEXTS[:1]))
    plain = slow_greedy(tiny, prompts.ids[0], 12, 2)
    meant = {
        "first": plain[:1],
        "nested": [plain[:1]],
        "biased": [[plain[:1], -50.0]],
        "fourth": plain[3],
    }
    model = copy.deepcopy(tiny)
    for name, value in asked.items():
        setattr(model.generation_config, name, meant.get(str(value), value))
    own, before = model.generation_config, model.generation_config.to_dict()
    end = own.eos_token_id if "eos_token_id" in asked else 2
    found = continuations(model, tokenizer, prompts, tokens=12, batch_size=1)["ids"][0]
    assert found.to_list() == (plain[: plain.index(end)] if end in plain else plain)
    assert model.generation_config is own
    assert own.to_dict() == before


def test_a_model_that_ends_at_once_is_seen_to_write_nothing(tiny, tokenizer):
    """Whose text repeats nothing, and looks perfect by that alone."""
    asked = {"tokenizer": tokenizer, "prompts": TEXTS[:1], "generate": 8}
    full = evaluate(tiny, **asked)
    silent = copy.deepcopy(tiny)
    silent.generation_config.eos_token_id = full.generations["ids"][0][0]
    table = differences({"full": full, "cut": evaluate(silent, **asked)})
    table = table.filter(measure=WRITTEN, metric="tokens")
    assert table["value"].to_list() == [full.generations["ids"].list.len()[0], 0]
    assert table["difference"].to_list() == [0, -table["value"][0]]
    assert table["higher_is_better"].null_count() == 2


def test_the_end_of_the_text_is_left_out(tiny, tokenizer):
    prompts = Prompts.read(tokenizer, read_corpus(TEXTS[:1]))
    plain = continuations(tiny, tokenizer, prompts, tokens=8, batch_size=1)["ids"][0].to_list()
    model = copy.deepcopy(tiny)
    for ends in (plain[3], [plain[3], 2]):
        model.generation_config.eos_token_id = ends
        found = continuations(model, tokenizer, prompts, tokens=8, batch_size=1)["ids"][0]
        assert found.to_list() == plain[: plain.index(plain[3])]


def test_prompts_are_spread_and_fit(tokenizer):
    corpus = read_corpus([f"document {number:02}" for number in range(40)])
    assert len(Prompts.read(tokenizer, corpus).ids) == 32
    found = Prompts.read(tokenizer, corpus, limit=4, room=2)
    assert found.rows == (0, 10, 20, 30)
    assert [tokenizer.decode(ids) for ids in found.ids] == ["00", "10", "20", "30"]


def test_tokens_beyond_the_embeddings_are_one_sentence(tokenizer):
    small = models.build("qwen2_moe", vocab_size=100)
    message = r"the tokenizer gives token \d+ but the model has embeddings of 100 tokens only"
    for asked in ({"corpus": ["zzz zzz"]}, {"prompts": ["zzz zzz"], "generate": 4}):
        with pytest.raises(DataError, match=message):
            evaluate(small, tokenizer=tokenizer, **asked)


def test_padded_embeddings_and_a_bare_tokenizer(tiny):
    """More rows than tokens, and neither padding nor an end of text."""
    inner = Tokenizer(token_models.BPE({letter: at for at, letter in enumerate("abcd")}, []))
    bare = PreTrainedTokenizerFast(tokenizer_object=inner)
    found = evaluate(tiny, tokenizer=bare, corpus=["abcd abcd", "dcba"], generate=10)
    assert found.generations.height == 2
    assert max(found.generations["ids"].explode(empty_as_null=False)) >= 4  # stands for no text


def test_what_is_asked_must_go_together(tiny):
    for asked, error, message in [
        ({"generate": 4}, MissingInputError, "nothing to go on with; give prompts or a corpus"),
        ({"prompts": ["a"]}, MissingInputError, "nothing to measure"),
        ({"prompts": ["a"], "corpus": ["a b"]}, MissingInputError, "say how much to write"),
        ({"corpus": ["a"], "generate": -1}, SettingsError, "generate is -1"),
        ({"corpus": ["a b"], "samples": "x.jsonl"}, MissingInputError, "give tasks, or leave"),
        ({"tasks": ["t"], "samples": "x.csv"}, SettingsError, "ending in .jsonl or .parquet"),
        ({"corpus": ["a b"], "batch_size": "8"}, SettingsError, 'at least 1, or "auto"'),
    ]:
        with pytest.raises(error, match=message):
            evaluate("no/such/model", **asked)
    with pytest.raises(SettingsError, match="generate is 64; it must be at most 63: model and"):
        evaluate(tiny, tokenizer=models.build_tokenizer(), prompts=["a"], generate=64)


def test_an_evaluation_holds_what_was_written(folder, tmp_path):
    """With paired differences from a masked model, over prompts."""
    keep = {layer: tuple(range(2)) for layer in range(3)}
    plan = type("P", (), {"keep": keep, "n_experts": models.N_EXPERTS, "top_k": models.TOP_K})
    asked = {"corpus": TEXTS, "generate": 24, "context": 64, "batch_size": "auto"}
    full = evaluate(folder, **asked, out=tmp_path / "full.json")
    with mask(str(folder), plan) as held:
        cut = evaluate(held, **asked, name="cut")
    assert full.repetition.equals(repetition(full.generations))
    assert full.repetition.columns == [
        *("prompt", "domain", "tokens", "rep_2", "rep_4", "loop", "stuck")
    ]
    again = load_evaluation(tmp_path / "full.json")
    assert again.generations.equals(full.generations)
    assert again.as_json() == full.as_json()
    assert "rep-4" in repr(again)
    table = differences({"full": again, "cut": cut}).filter(measure=WRITTEN, model="cut")
    for metric in ("rep_2", "rep_4", "loop", "stuck"):
        row = table.row(by_predicate=pl.col("metric") == metric, named=True)
        gap = cut.repetition[metric] - full.repetition[metric]
        assert row["difference"] == pytest.approx(gap.mean())
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert row["n"] == 4
    shorter = evaluate(folder, **asked | {"generate": 8}, name="shorter")
    apart = differences({"full": full, "shorter": shorter}).filter(measure=WRITTEN, model="shorter")
    assert apart["difference"].null_count() == apart.height


def test_older_files_have_nothing_written(folder, tmp_path):
    found = evaluate(folder, corpus=TEXTS)
    older = found.as_json()
    del older["generations"], older["usage"]
    write_json(tmp_path / "older.json", older)
    again = load_evaluation(tmp_path / "older.json")
    assert again.generations is None
    assert again.usage is None
    assert again.repetition is None
    empty = {name: [None] for name in ("prompt", "domain", "text", "written", "ids")}
    write_json(tmp_path / "bad.json", found.as_json() | {"generations": empty})
    with pytest.raises(DataError, match="holds prompts that nothing was written to"):
        load_evaluation(tmp_path / "bad.json")
