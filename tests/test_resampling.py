"""How sure scores and plans are: against simulation, closed forms and published figures."""

import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import kendalltau, spearmanr

import dumps
import moecollab as mc
import real_routing
from criteria.synthetic import Recorded, make_recorded
from moecollab import criteria
from moecollab.criteria.base import Needs
from moecollab.criteria.scores import Scores, load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, MissingInputError, PlanError, SettingsError, ShapeError
from moecollab.patterns.dictionary import HSDL
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import load_plan
from moecollab.pruning.rankings import agreement
from moecollab.pruning.resampling import jaccard, uncertainty
from moecollab.record.extraction import extract
from moecollab.record.folding import folds_of
from moecollab.record.folds import tallies_by


def drawn(folder, odds, n_documents=400, length=5, seed=0):
    """A recording whose every token picks one expert of one layer by `odds`, independently."""
    rng = np.random.default_rng(seed)
    n = n_documents * length
    expert = rng.choice(len(odds), size=(1, n, 1), p=odds).astype(np.uint16)
    return Recorded(
        expert=expert,
        weight=np.ones((1, n, 1), np.float32),
        norm=None,
        sample=np.repeat(np.arange(n_documents), length),
        n_experts=len(odds),
        layers=(0,),
    ).save(folder)


ODDS = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("drawn") / "acts", ODDS)


# sums by parts of the documents


def test_folds_are_even_and_the_same_every_time():
    found = folds_of(103, 10, seed=3)
    assert sorted(np.bincount(found)) == [10] * 7 + [11] * 3
    assert np.array_equal(found, folds_of(103, 10, seed=3))
    assert not np.array_equal(found, folds_of(103, 10, seed=4))


def test_parts_add_up_to_the_recording(acts):
    part = np.arange(acts.n_samples) % 3
    groups = ("routing", "norms", "pairs", "vocabulary")
    found, whole = tallies_by(acts, part, 3, groups), acts.tallies().total()
    for name in found.arrays:
        if name in whole:
            assert np.allclose(found.total()[name], whole[name], rtol=1e-12), name
    assert {"count", "sum_weight_sq", "sum_norm_sq", "sum_weighted_norm_sq"} <= set(whole.keys())
    assert "max_abs" not in found


def test_a_part_is_what_its_documents_alone_would_be(tmp_path):
    recorded = make_recorded()
    acts = recorded.save(tmp_path / "whole")
    groups = ("routing", "norms", "pairs", "vocabulary")
    found = tallies_by(acts, (np.arange(acts.n_samples) == 2).astype(np.int64), 2, groups)
    tokens = np.flatnonzero(recorded.sample == 2)
    for row in range(acts.n_layers):
        chosen = recorded.expert[row, tokens]
        used = recorded.weight[row, tokens] != 0
        for expert in range(acts.n_experts):
            here = (chosen == expert) & used
            assert found["count"][1, row, expert] == here.sum()
            norms = recorded.norm[row, tokens][here].astype(np.float64)
            assert found["sum_norm"][1, row, expert] == pytest.approx(norms.sum())
            together = (here.any(axis=1)[:, None] & used)[..., None] & (
                chosen[..., None] == np.arange(acts.n_experts)
            )
            assert (found["pair_count"][1, row, expert] == together.sum(axis=(0, 1))).all()


@pytest.fixture(scope="module")
def shifted(model_folder, texts, tmp_path_factory):
    """A recording with all sums and no folds."""
    out = tmp_path_factory.mktemp("shifted") / "acts"
    return extract(model_folder, texts, out=out, collect="shift,channels,probability,pairs")


@pytest.fixture(scope="module")
def folded(model_folder, texts, tmp_path_factory):
    """The same with two folds."""
    out = tmp_path_factory.mktemp("folded") / "acts"
    collect = "shift,channels,probability,pairs"
    return extract(model_folder, texts, out=out, collect=collect, folds=2)


def test_recorded_folds_are_those_of_the_tables(shifted, folded):
    found = folded.fold_tallies()
    part = folds_of(folded.n_samples, 2, seed=0)
    tables = tallies_by(folded, part, 2, ("routing", "norms", "pairs"))
    assert found.domains == tables.domains
    for name in tables.arrays:
        assert np.allclose(found[name], tables[name], rtol=1e-12), name
    assert shifted.fold_tallies() is None


def test_folds_change_nothing_else(shifted, folded):
    found, wanted = folded.tallies(), shifted.tallies()
    assert found.domains == wanted.domains
    assert set(found.arrays) == set(wanted.arrays) == set(folded.fold_tallies().arrays)
    for name in wanted.arrays:
        if not name.startswith("peak_"):
            assert np.allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12), name
            total = folded.fold_tallies().total()[name]
            assert np.allclose(total, wanted.total()[name], rtol=1e-9, atol=1e-12), name
    assert folded.samples().equals(shifted.samples())
    for layer in shifted.layers:
        assert np.array_equal(folded.layer(layer).expert, shifted.layer(layer).expert)
    assert "folds" not in shifted.manifest["settings"]


@pytest.mark.parametrize(
    "criterion", ["easy_ep", "max_activation", "mean_output_norm", "soft_routing"]
)
def test_recorded_folds_answer_all_sums(criterion, folded):
    found = uncertainty(criterion, folded, drop=0.5, resamples=30)
    assert found.spread.settings["folds"] == [2]
    assert (found.spread.standard_error > 0).any()
    again = uncertainty(criterion, folded, drop=0.5, resamples=30)
    assert np.array_equal(again.spread.low, found.spread.low)


@pytest.mark.parametrize("folds", [None, 2, 3])
def test_folds_that_are_asked_for_are_drawn(folds, folded):
    """Routing counts are in the tables too, so any number of folds can be made of them."""
    found = uncertainty("frequency", folded, drop=0.5, resamples=10, folds=folds)
    assert found.spread.settings["folds"] == [folds or 2]


def test_folds_that_a_recording_cannot_have_are_refused(folded, acts):
    with pytest.raises(SettingsError, match=r"folds is 3; it must be 2, with which .* was made"):
        uncertainty("easy_ep", folded, drop=0.5, resamples=10, folds=3)
    most = acts.n_samples
    with pytest.raises(SettingsError, match=rf"folds is {most + 1}; it must be at most {most}, "):
        uncertainty("frequency", acts, drop=0.5, resamples=10, folds=most + 1)
    one = uncertainty("easy_ep", folded, drop=0.5, resamples=10, folds=2)
    assert one.spread.settings["folds"] == [2]


def test_folds_that_cannot_be(model_folder, texts, tmp_path):
    with pytest.raises(SettingsError, match="folds is 1; it must be 2 or more, or 0"):
        extract(model_folder, texts, out=tmp_path / "acts", folds=1)
    with pytest.raises(SettingsError, match=r"folds is 2\.5; it must be a whole number"):
        extract(model_folder, texts, out=tmp_path / "acts", folds=2.5)
    with pytest.raises(DataError, match="folds are of documents, of which there is 1"):
        extract(model_folder, texts[:1], out=tmp_path / "acts", folds=2)
    assert not list(tmp_path.iterdir())


def test_sums_that_tables_do_not_hold(acts, shifted):
    part = np.zeros(acts.n_samples, np.int64)
    with pytest.raises(MissingInputError, match="sums of 'shift' cannot be had for parts"):
        tallies_by(acts, part, 1, ("shift",))
    with pytest.raises(ShapeError, match="part has shape"):
        tallies_by(acts, part[:1], 1)
    with pytest.raises(MissingInputError, match=r"easy_ep reads .*; extract again with folds=32"):
        uncertainty("easy_ep", shifted, drop=0.5)
    with pytest.raises(MissingInputError, match=r"max_abs was not recorded .* folds=32"):
        uncertainty("max_activation", acts, drop=0.5)


def test_norms_that_were_not_recorded_are_no_zeros(model_folder, texts, tmp_path):
    bare = extract(model_folder, texts, out=tmp_path / "bare", norms=False)
    part = np.arange(bare.n_samples) % 2
    with pytest.raises(MissingInputError, match="has no norms; extract again with norms=True"):
        tallies_by(bare, part, 2)
    assert tallies_by(bare, part, 2, ("routing",)).count.sum() > 0


# standard errors, intervals, probabilities


def test_standard_error_of_a_count_is_binomial(simple):
    """n p (1 - p) for independent tokens; 64 folds and 400 draws leave about 10 %."""
    found = uncertainty("frequency", simple, drop=0.5, resamples=400, folds=400)
    n = simple.n_tokens
    expected = np.sqrt(n * ODDS * (1 - ODDS))
    assert np.allclose(found.spread.standard_error[0], expected, rtol=0.15)
    share = uncertainty("esft_token", simple, drop=0.5, resamples=400, folds=64)
    assert np.allclose(share.spread.standard_error[0], expected / n, rtol=0.3)


def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path):
    """Of 40 recordings × 6 experts, 95 % intervals of shares hold the odds about 95 % of times."""
    inside = []
    for seed in range(40):
        acts = drawn(tmp_path / str(seed), ODDS, n_documents=200, seed=seed)
        spread = uncertainty("esft_token", acts, drop=0.5, resamples=150, seed=seed).spread
        inside.append((spread.low[0] <= ODDS) & (spread.high[0] >= ODDS))
    assert 0.88 <= np.mean(inside) <= 0.99


def test_kept_probability_and_stability_agree_with_new_recordings(tmp_path):
    """Experts of almost equal use: what the resamples say, beside 60 recordings made anew."""
    odds = np.array([0.3, 0.2, 0.16, 0.15, 0.13, 0.06])
    masks = []
    for seed in range(60):
        acts = drawn(tmp_path / str(seed), odds, n_documents=300, length=3, seed=seed)
        masks.append(_kept(plan(score("frequency", acts), drop=0.5), 6))
    masks = np.array(masks)[:, None]
    fresh = jaccard(masks[::2], masks[1::2]).mean()
    found = [
        uncertainty("frequency", tmp_path / str(seed), drop=0.5, resamples=100).spread.stability
        for seed in range(12)
    ]
    assert np.mean(found) == pytest.approx(fresh, abs=0.12)
    assert fresh < 0.95


def _kept(made, n_experts):
    return np.isin(np.arange(n_experts), made.keep[0])


def test_what_is_clear_is_sure(simple):
    found = uncertainty("frequency", simple, drop=0.5, resamples=50)
    assert found.spread.kept_probability[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert found.spread.stability == 1
    made = plan(found, drop=0.5)
    assert made.sureness == 1
    assert "they stay in 100 % of draws" in repr(made)
    assert "resamples keep 100 % the same" in repr(found)
    assert plan(found, drop=1 / 3).sureness is None


@pytest.mark.parametrize("criterion", ["reap", "frequency", "msan", "esft_gate", "random"])
def test_scores_are_those_of_all_documents(criterion, acts):
    found = uncertainty(criterion, acts, drop=0.25, resamples=20)
    assert np.array_equal(found.values, score(criterion, acts).values)
    assert found.activations == acts.digest()
    assert (found.spread.low <= found.spread.high).all()


def test_the_report_says_how_sure_a_plan_is(acts, tmp_path):
    scores = uncertainty("reap", acts, drop=0.5, resamples=40)
    made = plan(scores, drop=0.5)
    kept = [
        scores.spread.kept_probability[row, list(k)] for row, k in enumerate(made.keep.values())
    ]
    assert made.sureness == pytest.approx(np.mean(kept))
    mc.report(tmp_path / "report.html", activations=acts, plan=made)
    page = (tmp_path / "report.html").read_text()
    value = float(re.search(r'<data value="([^"]+)" data-key="plan.sureness">', page)[1])
    assert value == pytest.approx(made.sureness)
    assert "would stay on other texts like these" in page


def test_chance_is_not_stable(simple):
    found = uncertainty("random", simple, drop=0.5, resamples=400)
    assert np.allclose(found.spread.kept_probability, 0.5, atol=0.1)
    # |A ∩ B| / |A ∪ B| of two random halves of 6: k / (6 - k), hypergeometric in k
    chance = sum(k / (6 - k) * p for k, p in enumerate(np.array([1, 9, 9, 1]) / 20))
    assert found.spread.stability == pytest.approx(chance, abs=0.06)


def test_several_recordings_vary_by_seed_too(tmp_path):
    """Two recordings that differ by more than their documents do."""
    first = drawn(tmp_path / "a", ODDS, seed=1)
    second = drawn(tmp_path / "b", ODDS[[3, 4, 5, 0, 1, 2]], seed=2)
    both = uncertainty("frequency", [first, second], drop=0.5, resamples=200)
    alone = uncertainty("frequency", first, drop=0.5, resamples=200)
    assert alone.spread.stability == 1
    assert both.spread.stability < 0.9
    total = score("frequency", first).values + score("frequency", second).values
    assert np.array_equal(both.values, total)
    assert (both.spread.standard_error > 3 * alone.spread.standard_error).all()


def test_equal_seeds_give_equal_bytes(acts, tmp_path):
    for name in ("a", "b"):
        uncertainty("reap", acts, drop=0.5, resamples=10, out=tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    other = uncertainty("reap", acts, drop=0.5, resamples=10, seed=1)
    assert not np.array_equal(
        other.spread.standard_error, load_scores(tmp_path / "a.parquet").spread.standard_error
    )


def test_file_round_trip(acts, tmp_path):
    made = uncertainty("reap", acts, experts=5, resamples=10, out=tmp_path / "reap.parquet")
    found = load_scores(tmp_path / "reap.parquet")
    assert found.spread.about() == made.spread.about()
    for name, value in made.spread.arrays().items():
        assert np.array_equal(found.spread.arrays()[name], value)
    decided = plan(found, experts=5, out=tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").sureness == decided.sureness is not None
    columns = pl.read_parquet(tmp_path / "reap.parquet").columns
    assert columns[-4:] == ["standard_error", "low", "high", "kept_probability"]


@pytest.mark.parametrize(
    ("criterion", "asked", "error", "message"),
    [
        ("caep", {"drop": 0.5}, MissingInputError, "needs collaboration.* pass collaboration="),
        ("caep", {"experts": 5}, SettingsError, "drop for caep, which ranks for one share"),
        ("aimer", {"drop": 0.5}, SettingsError, "reads parameters; other documents change nothing"),
        ("delta_nll", {"drop": 0.5}, SettingsError, "answers .*, and this runs the model; to see"),
        ("ranked_choice", {"drop": 0.5}, MissingInputError, "collect='preferences'"),
        ("reap", {}, MissingInputError, "is not said; give drop .* experts or mass"),
        ("reap", {"drop": 0.5, "folds": 1}, SettingsError, "folds is 1"),
        ("reap", {"drop": 0.5, "resamples": 1}, SettingsError, "resamples is 1"),
        ("reap", {"drop": 0.5, "resamples": 2.5}, SettingsError, "resamples is 2.5; it must be a"),
        ("reap", {"drop": 0.5, "folds": "8"}, SettingsError, "folds is '8'; it must be a whole"),
        ("reap", {"drop": 0.5, "seed": "0"}, SettingsError, "seed is '0'; it must be a whole"),
        ("reap", {"drop": 0.5, "confidence": 1.0}, SettingsError, "confidence is 1.0"),
        ("reap", {"drop": 0.5, "confidence": "1"}, SettingsError, "confidence is '1'"),
    ],
)
def test_what_cannot_be_resampled(acts, criterion, asked, error, message):
    with pytest.raises(error, match=message):
        uncertainty(criterion, acts, **asked)


def test_one_document_says_nothing_of_others(tmp_path):
    acts = drawn(tmp_path / "acts", ODDS, n_documents=1)
    with pytest.raises(DataError, match="has 1 documents, of which no others can be drawn"):
        uncertainty("frequency", acts, drop=0.5)
    with pytest.raises(DataError, match="no recordings"):
        uncertainty("frequency", [], drop=0.5)


# published figures, from sums by halves of one recording


@pytest.mark.parametrize(
    ("task", "wanted"), [("intent", 0.919), ("law", 0.854), ("summary", 0.814)]
)
def test_alternate_sequences_keep_as_much_as_published(task, wanted, tmp_path):
    arrays = np.load(real_routing.routing_folder() / f"{task}.npz")
    truth = dumps.Truth(
        ids=arrays["topk_ids"],
        weights=arrays["topk_weights"],
        token_ids=np.zeros(len(arrays["topk_ids"])),
        lengths=tuple(arrays["seq_lens"].tolist()),
        n_experts=64,
        layers=tuple(arrays["moe_layer_ids"].tolist()),
    )
    folder = dumps.write_esft(tmp_path / task, truth)
    acts = mc.import_routing("esft", folder, out=tmp_path / "acts", experts=64, top_k=6)
    halves = tallies_by(acts, np.arange(acts.n_samples) % 2, 2, ("routing",))
    kept = np.argsort(np.argsort(-halves.count, axis=2, kind="stable"), axis=2) < 32
    assert jaccard(kept[0], kept[1]).mean() == pytest.approx(wanted, abs=0.01)
    # two whole recordings agree more than two halves of one
    found = uncertainty("frequency", acts, experts=32, resamples=40)
    assert wanted - 0.01 < found.spread.stability < 1


# rankings side by side


def make_scores(values, name="reap"):
    values = np.asarray(values, dtype=np.float64)
    counts, layers = np.ones(values.shape, np.int64), tuple(range(len(values)))
    return Scores(criterion=name, values=values, counts=counts, layers=layers, top_k=1)


def test_agreement_is_that_of_scipy():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (3, 4, 12)).astype(float)
    found = agreement([make_scores(v, n) for v, n in zip(values, "abb", strict=True)], drop=0.5)
    assert found["first"].to_list() == ["a", "a", "b 1"]
    assert found["second"].to_list() == ["b 1", "b 2", "b 2"]
    for row, (one, other) in zip(
        found.iter_rows(named=True), [(0, 1), (0, 2), (1, 2)], strict=True
    ):
        pairs = list(zip(values[one], values[other], strict=True))
        assert row["spearman"] == pytest.approx(np.mean([spearmanr(*p).statistic for p in pairs]))
        assert row["kendall"] == pytest.approx(np.mean([kendalltau(*p).statistic for p in pairs]))
        kept = [plan(make_scores(values[i]), drop=0.5).keep for i in (one, other)]
        shared = [
            len({*a} & {*b}) / len({*a} | {*b})
            for a, b in zip(kept[0].values(), kept[1].values(), strict=True)
        ]
        assert row["jaccard"] == pytest.approx(np.mean(shared))


def test_opposite_equal_and_constant_rankings(tmp_path):
    up, down, flat = (
        make_scores([[1, 2, 3, 4]]),
        make_scores([[4, 3, 2, 1]]),
        make_scores([[1] * 4]),
    )
    found = agreement([up, up, down, flat], out=tmp_path / "table.parquet")
    assert found["kendall"].to_list()[:2] == pytest.approx([1, -1])
    assert found["jaccard"].to_list()[:2] == [1, 0]
    assert found["spearman"].to_list()[2] is None
    assert pl.read_parquet(tmp_path / "table.parquet").equals(found)
    with pytest.raises(DataError, match="nothing to agree with"):
        agreement([up])
    with pytest.raises(ShapeError, match="not of the same layers"):
        agreement([up, make_scores([[1, 2]])])


def test_plans_for_another_drop_or_by_similarities_are_not_compared(simple):
    made = replace(make_scores([[1, 2, 3, 4]], "caep"), settings={"drop": 0.25})
    assert agreement([made, made], drop=0.25)["jaccard"].to_list() == [1]
    with pytest.raises(PlanError, match=r"caep scores hold for drop=0.25, not 0.5"):
        agreement([made, made])
    with pytest.raises(SettingsError, match="or 'entropy' where plans are compared"):
        agreement([made, made], drop=0.25, per="similarity")
    with pytest.raises(SettingsError, match="or 'entropy' for resampled plans"):
        uncertainty("frequency", simple, drop=0.5, per="similarity")


def test_recordings_with_and_without_folds_are_resampled_together(model_folder, texts, tmp_path):
    acts = [extract(model_folder, texts, out=tmp_path / str(n), folds=n) for n in (0, 4)]
    found = uncertainty("frequency", acts, drop=0.5, resamples=20)
    assert found.spread.settings["folds"] == [acts[0].n_samples, 4]
    assert (found.counts == 2 * score("frequency", acts[0]).counts).all()


ANSWERED = [
    name
    for name in criteria.names()
    if not criteria.get(name).needs & (Needs.WEIGHTS | Needs.MODEL)
]


@pytest.fixture(scope="module")
def recorded_whole(model_folder, texts, tmp_path_factory):
    """A recording of all there is, in folds, and patterns."""
    collect = "shift,channels,probability,pairs,vocabulary,preferences"
    out = tmp_path_factory.mktemp("whole") / "acts"
    acts = extract(model_folder, texts, out=out, collect=collect, folds=4)
    return acts, HSDL(atoms=(6, 4), seed=0, threads=1).fit(acts)


@pytest.mark.parametrize("criterion", ANSWERED)
def test_every_criterion_that_a_recording_answers_can_be_resampled(criterion, recorded_whole):
    acts, patterns = recorded_whole
    found = uncertainty(criterion, acts, collaboration=patterns, drop=0.5, resamples=10)
    assert np.isfinite(found.spread.standard_error).all()
    assert (found.spread.standard_error > 0).any()
    assert found.spread.kept_probability.sum() == pytest.approx(found.n_sites / 2)
