"""Plans made in rounds, each on a recording of what the last one left."""

import json
from itertools import pairwise

import numpy as np
import pytest

import models
from moecollab.criteria.scores import load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, OutputExistsError, PlanError, SettingsError, StaleInputError
from moecollab.models.keep import read_keep
from moecollab.models.loading import load_model
from moecollab.models.masked import Mask
from moecollab.models.masking import mask
from moecollab.models.routing import find_moe_layers
from moecollab.patterns.dictionary import HSDL
from moecollab.pruning.iteration import iterate
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import load_plan
from moecollab.record.activations import load_activations
from moecollab.record.extraction import extract


@pytest.fixture(scope="module")
def iterated(model_folder, texts, tmp_path_factory):
    """Four rounds of REAP to a half; not to be changed."""
    out = tmp_path_factory.mktemp("iterated") / "run"
    iterate(model_folder, texts, "reap", drop=0.5, rounds=4, out=out)
    return out


@pytest.mark.parametrize("criterion", ["reap", "frequency", "weight_norm", "easy_ep"])
@pytest.mark.parametrize("per", ["layer", "model"])
def test_one_round_is_score_and_plan(criterion, per, model_folder, texts, tmp_path):
    made = iterate(
        model_folder, texts, criterion, drop=0.5, rounds=1, per=per, out=tmp_path / "run"
    )
    acts = extract(model_folder, texts, out=tmp_path / "acts", collect="shift")
    scores = score(criterion, acts, model=model_folder)
    assert made.keep == plan(scores, drop=0.5, per=per).keep
    assert load_plan(tmp_path / "run" / "plan.json") == made


def test_every_round_drops_more_of_the_same(iterated):
    plans = [load_plan(iterated / f"round-{number}" / "plan.json") for number in range(1, 5)]
    assert [one.n_dropped / one.n_sites for one in plans] == [0.125, 0.25, 0.375, 0.5]
    for less, more in pairwise(plans):
        assert all(set(less.dropped[layer]) < set(more.dropped[layer]) for layer in less.layers)
    assert load_plan(iterated / "plan.json") == plans[-1]


def test_rounds_are_recorded_under_the_ids_of_the_whole_model(iterated):
    """Who is gone is never routed to; all tokens go to those that stay."""
    for number in range(2, 5):
        before = load_plan(iterated / f"round-{number - 1}" / "plan.json")
        acts = load_activations(iterated / f"round-{number}" / "activations")
        count = acts.tallies().total().count
        assert acts.n_experts == before.n_experts
        for row, layer in enumerate(acts.layers):
            assert count[row, list(before.dropped[layer])].sum() == 0
            assert count[row].sum() == acts.n_tokens * acts.top_k
            assert (count[row, list(before.keep[layer])] > 0).any()


def test_each_round_is_what_its_steps_by_hand_are(iterated, model_folder, texts, tmp_path):
    """Round 2: the model under the first plan, recorded, scored, planned with what is gone."""
    first = load_plan(iterated / "round-1" / "plan.json")
    with mask(model_folder, first) as masked:
        tokenizer = load_model(model_folder)[1]
        acts = extract(masked.model, texts, out=tmp_path / "acts", tokenizer=tokenizer)
    scores = score("reap", acts)
    found = load_scores(iterated / "round-2" / "scores.parquet")
    assert np.array_equal(scores.values, found.values)
    made = plan(scores, drop=0.25, drop_list=first.dropped)
    assert made.keep == load_plan(iterated / "round-2" / "plan.json").keep


def test_rounds_matter(model_folder, texts, tmp_path):
    """Four rounds of this criterion do not end where one ends."""
    asked = {"criterion": "ean_mean", "drop": 0.5}
    once, often = (
        iterate(model_folder, texts, rounds=n, out=tmp_path / str(n), **asked) for n in (1, 4)
    )
    assert once.keep != often.keep
    assert once.n_dropped == often.n_dropped


def test_equal_runs_make_equal_bytes(iterated, model_folder, texts, tmp_path):
    iterate(model_folder, texts, "reap", drop=0.5, rounds=4, out=tmp_path / "run")
    for name in ("plan.json", "round-3/scores.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (iterated / name).read_bytes()


def test_a_stopped_run_goes_on(iterated, model_folder, texts, tmp_path, monkeypatch):
    asked = {"drop": 0.5, "rounds": 4, "out": tmp_path / "run"}
    recorded = []

    def stop(model, corpus, **settings):
        recorded.append(settings["out"].parent.name)
        if recorded == ["round-1", "round-2", "round-3"]:
            raise KeyboardInterrupt
        return extract(model, corpus, **settings)

    monkeypatch.setattr("moecollab.pruning.iteration.extract", stop)
    with pytest.raises(KeyboardInterrupt):
        iterate(model_folder, texts, "reap", **asked)
    assert not (tmp_path / "run" / "plan.json").exists()
    iterate(model_folder, texts, "reap", **asked)
    assert recorded == ["round-1", "round-2", "round-3", "round-3", "round-4"]
    made = (tmp_path / "run" / "plan.json").read_bytes()
    assert made == (iterated / "plan.json").read_bytes()


def test_other_settings_are_refused_or_start_over(model_folder, texts, tmp_path):
    asked = {"rounds": 2, "out": tmp_path / "run"}
    iterate(model_folder, texts, "reap", drop=0.5, **asked)
    with pytest.raises(OutputExistsError):
        iterate(model_folder, texts, "reap", drop=0.5, **asked)
    (tmp_path / "run" / "plan.json").unlink()
    with pytest.raises(StaleInputError, match="rounds of another model, text or other settings"):
        iterate(model_folder, texts, "reap", drop=0.25, **asked)
    made = iterate(model_folder, texts, "reap", drop=0.25, overwrite=True, **asked)
    assert made.drop == 0.25
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]
    assert settings["drop"] == 0.25


def test_a_keep_list_that_changed_is_another_setting(model_folder, texts, tmp_path):
    listed = tmp_path / "keep.json"
    listed.write_text('{"0": [1]}')
    asked = {"drop": 0.5, "rounds": 2, "out": tmp_path / "run"}
    iterate(model_folder, texts, "reap", keep=listed, **asked)
    (tmp_path / "run" / "plan.json").unlink()
    made = iterate(model_folder, texts, "reap", keep={0: (1,)}, **asked)
    assert made.protected == {0: (1,)}
    (tmp_path / "run" / "plan.json").unlink()
    listed.write_text('{"0": [2]}')
    with pytest.raises(StaleInputError, match="other settings"):
        iterate(model_folder, texts, "reap", keep=listed, **asked)


def test_a_loaded_model_is_left_as_it_was(texts, tokenizer, token_ids, logits, tmp_path):
    model = models.build("mixtral")
    before = logits(model, token_ids)
    iterate(model, texts, "reap", drop=0.5, rounds=2, out=tmp_path / "run", tokenizer=tokenizer)
    assert (logits(model, token_ids) == before).all()
    with Mask(model, read_keep(load_plan(tmp_path / "run" / "plan.json"))):
        assert (logits(model, token_ids) != before).any()


def test_router_groups_stay_even(texts, tmp_path):
    folder = models.save("deepseek_v3", tmp_path / "model", n_group=2, topk_group=1)
    made = iterate(folder, texts, "frequency", drop=0.5, rounds=2, out=tmp_path / "run")
    assert all(sum(expert < 4 for expert in kept) == 2 for kept in made.keep.values())
    assert len(find_moe_layers(load_model(folder)[0])) == len(made.keep)


def test_patterns_are_fitted_in_every_round(model_folder, texts, tmp_path):
    hsdl = HSDL(atoms=(4, 8), max_iterations=3, threads=1)
    out = tmp_path / "run"
    with pytest.warns(match="stopped|tolerance|iterations"):
        made = iterate(model_folder, texts, "caep", drop=0.5, rounds=2, out=out, hsdl=hsdl)
    assert made.n_dropped == made.n_sites // 2
    folders = sorted(path.parent.name for path in out.glob("*/collaboration"))
    assert folders == ["round-1", "round-2"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"rounds": 0}, SettingsError, "rounds is 0; it must be 1 or more"),
        ({"per": "similarity"}, SettingsError, "'layer', 'model' or 'entropy' in rounds"),
        ({"criterion": "soft_routing"}, SettingsError, "that a recording of a masked model answ"),
        ({"drop": 0.9}, PlanError, "the router selects top_k"),
        ({"keep": {0: [99]}}, SettingsError, "keep is"),
    ],
)
def test_what_cannot_be_iterated(asked, error, message, model_folder, texts, tmp_path):
    wanted = {"criterion": "reap", "drop": 0.5, "rounds": 1} | asked
    with pytest.raises(error, match=message):
        iterate(model_folder, texts, out=tmp_path / "run", **wanted)


def test_a_masked_folder_is_refused(iterated, model_folder, texts, tmp_path):
    mask(model_folder, iterated / "plan.json", out=tmp_path / "masked")
    with pytest.raises(DataError, match="give the model that it masks"):
        iterate(tmp_path / "masked", texts, "reap", drop=0.5, out=tmp_path / "run")
