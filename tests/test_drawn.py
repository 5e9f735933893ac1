"""Documents drawn with replacement: beside recordings in which they really are repeated."""

from dataclasses import replace

import numpy as np
import pytest

from criteria.synthetic import make_recorded
from moecollab import criteria
from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.criteria.scoring import score
from moecollab.errors import MissingInputError, SettingsError, ShapeError, StaleInputError
from moecollab.patterns.dictionary import HSDL
from moecollab.patterns.drawn import used_by
from moecollab.pruning.draws import drawn_evidence, sources_of
from moecollab.pruning.planning import plan
from moecollab.pruning.resampling import jaccard, uncertainty
from moecollab.record.drawn import Documents
from moecollab.record.extraction import extract
from moecollab.record.folds import tallies_by

TIMES = np.array([2, 0, 1, 3, 0])


@pytest.fixture(scope="module")
def recorded():
    """Five documents of different lengths."""
    return make_recorded(n_tokens=80)


@pytest.fixture(scope="module")
def acts(recorded, tmp_path_factory):
    return recorded.save(tmp_path_factory.mktemp("source") / "acts")


def repeated(recorded, times=TIMES):
    """The recording of a text in which documents really are repeated."""
    document = np.repeat(np.arange(len(times)), times)
    tokens = [np.flatnonzero(recorded.sample == one) for one in document]
    sample = np.repeat(np.arange(len(document)), [len(one) for one in tokens])
    return recorded.part(np.concatenate(tokens)).changed(sample=sample)


@pytest.fixture(scope="module")
def concatenated(recorded, tmp_path_factory):
    return repeated(recorded).save(tmp_path_factory.mktemp("repeated") / "acts")


@pytest.fixture(scope="module")
def drawn(acts):
    return Documents(acts).drawn(TIMES)


def patterns_of(acts, **settings):
    return HSDL(atoms=(5, 4), seed=0, threads=1, **settings).fit(acts)


# the view reads as the recording of the documents drawn


@pytest.mark.parametrize("grain", ["token", "sample", "sample_sum"])
@pytest.mark.parametrize("weights", ["renormalised", "raw", "binary", "output"])
def test_rows_are_those_of_the_text_drawn(grain, weights, drawn, concatenated):
    found, wanted = drawn.rows(grain, weights), concatenated.rows(grain, weights)
    for name in ("indptr", "sites", "values", "sample"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


def test_tables_are_those_of_the_text_drawn(drawn, concatenated):
    assert (drawn.n_tokens, drawn.n_samples) == (concatenated.n_tokens, concatenated.n_samples)
    columns = ["token", "sample", "token_id"]
    assert drawn.tokens().select(columns).equals(concatenated.tokens().select(columns))
    assert drawn.samples()["n_tokens"].equals(concatenated.samples()["n_tokens"])
    assert drawn.samples()["sample"].equals(concatenated.samples()["sample"])
    assert drawn.vocabulary() == drawn.source.acts.vocabulary()
    for layer in drawn.layers:
        for span in (None, (3, 17)):
            found, wanted = drawn.layer(layer, span), concatenated.layer(layer, span)
            for name in ("expert", "weight", "norm", "next"):
                assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
            assert not found.expert.flags.writeable
    kept = [
        name for name in drawn.to_polars().collect_schema() if name not in ("domain", "position")
    ]
    found, wanted = (one.to_polars().select(kept).collect() for one in (drawn, concatenated))
    assert found.equals(wanted)


def test_blocks_are_parts_of_the_rows(drawn):
    blocks = list(drawn.token_blocks("raw", size=13))
    assert sum(block.n_rows for block in blocks) == drawn.n_tokens
    joined = np.concatenate([block.values for block in blocks])
    assert np.array_equal(joined, drawn.rows("token", "raw").values)


def test_sums_are_those_of_the_documents(drawn, acts):
    parts = tallies_by(acts, np.arange(5), 5, ("routing", "norms", "pairs"))
    found = drawn.tallies()
    assert found.domains == acts.domains
    for name, value in parts.arrays.items():
        wanted = np.tensordot(TIMES.astype(value.dtype), value, axes=1)
        assert np.allclose(found.total()[name], wanted, rtol=1e-12), name


def test_digests_tell_draws_apart(acts, drawn):
    documents = Documents(acts)
    assert documents.drawn(TIMES).digest() == drawn.digest() != acts.digest()
    assert documents.drawn(TIMES[::-1]).digest() != drawn.digest()
    assert drawn.fold_tallies() is None


# what criteria say of the documents drawn


def shown(name, acts, times, patterns=None, domains=Needs.NOTHING):
    """What a criterion is shown when each document is a fold of its own."""
    criterion = replace(criteria.get(name), needs=criteria.get(name).needs | domains)
    (source,) = sources_of(criterion, [acts], [patterns], folds=acts.n_samples, seed=0)

    class Told:
        """Draws the only recording, then the folds that are told."""

        def integers(self, low, high, size):
            folds = np.empty(acts.n_samples, np.int64)
            folds[source.fold] = times
            return np.zeros(1, int) if high == 1 else np.repeat(np.arange(high), folds)

    plain = Evidence(tallies=source.sums, top_k=acts.top_k, drop=0.5)
    (found,) = drawn_evidence(criterion, [source], plain, Told())
    return found


@pytest.mark.parametrize(
    "name", ["output_coverage", "shapley", "ranked_choice", "frequency", "reap"]
)
def test_scores_are_those_of_the_text_with_documents_repeated(name, acts, concatenated):
    found = criteria.get(name).function(shown(name, acts, TIMES))
    assert np.allclose(found, score(name, concatenated).values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", ["token", "sample"])
@pytest.mark.parametrize("name", ["caep", "caep_composed"])
def test_patterns_are_used_as_the_text_with_documents_repeated_uses_them(
    name, rows, acts, recorded, concatenated
):
    """The codes of repeated rows, added up by hand, under the atoms of the fit."""
    collab = patterns_of(acts, rows=rows)
    sample = recorded.sample if rows == "token" else np.arange(5)
    order = np.concatenate(
        [np.flatnonzero(sample == one) for one in np.repeat(np.arange(5), TIMES)]
    )
    codes = collab.codes.matrix(len(collab.levels[0].atoms)).toarray()[order].astype(np.float64)
    levels = [replace(collab.levels[0], usage=codes.sum(axis=0), peak=codes.max(axis=0))]
    for level in collab.levels[1:]:
        links = level.links * (levels[-1].peak > 0)[:, None]
        use = {"usage": levels[-1].usage @ links.astype(np.float64), "peak": links.max(axis=0)}
        levels.append(replace(level, **use))
    by_hand = replace(collab, levels=tuple(levels), activations=concatenated.digest())
    found = criteria.get(name).function(shown(name, acts, TIMES, collab))
    wanted = score(name, concatenated, collaboration=by_hand, drop=0.5).values
    assert np.allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("rows", ["token", "sample"])
def test_all_documents_once_use_patterns_as_fitted(rows, acts):
    collab = patterns_of(acts, rows=rows)
    found = used_by(collab, Documents(acts).drawn(np.ones(5, np.int64)))
    for level, wanted in zip(found.levels, collab.levels, strict=True):
        assert np.allclose(level.usage, wanted.usage, rtol=1e-5)
        assert np.allclose(level.peak, wanted.peak, rtol=1e-5)
    assert found.codes.n_rows == collab.codes.n_rows


def test_domains_are_those_of_the_documents_drawn(acts):
    """Documents 1 and 4 are not drawn; 0, 2 and 4 are of the first domain."""
    parts = tallies_by(acts, np.arange(5), 5, ("routing",)).count
    found = shown("frequency", acts, TIMES, domains=Needs.DOMAINS).by_domain
    assert found.domains == ("law", "maths")
    assert np.array_equal(found.count[0], 2 * parts[0] + parts[2])
    assert np.array_equal(found.count[1], 3 * parts[3])
    alone = shown("frequency", acts, np.array([5, 0, 0, 0, 0]), domains=Needs.DOMAINS).by_domain
    assert alone.domains == ("law",)


# through the front door


@pytest.fixture
def by_tokens():
    """`frequency`, counted anew from single tokens."""

    def counted(evidence):
        acts = evidence.activations
        used = [(table.expert, table.weight != 0) for table in map(acts.layer, acts.layers)]
        found = [np.bincount(ids[on], minlength=acts.n_experts) for ids, on in used]
        return np.stack(found).astype(np.float64)

    criteria.register(Criterion("counted", Needs.ROUTING | Needs.TOKENS, counted))
    yield "counted"
    criteria.unregister("counted")


def test_single_tokens_and_sums_give_the_same_to_the_last_bit(by_tokens, acts, tmp_path):
    """Counts are whole numbers, so the two paths must not differ at all."""
    found, wanted = (
        uncertainty(name, acts, drop=0.5, resamples=40, seed=3) for name in (by_tokens, "frequency")
    )
    for name, value in wanted.spread.arrays().items():
        assert np.array_equal(found.spread.arrays()[name], value), name
    assert found.spread.stability == wanted.spread.stability


def test_recorded_folds_are_drawn_the_same_by_tokens_and_by_sums(
    by_tokens, model_folder, texts, tmp_path
):
    acts = extract(model_folder, texts, out=tmp_path / "acts", folds=3, seed=5)
    found, wanted = (
        uncertainty(name, acts, drop=0.5, resamples=30) for name in (by_tokens, "frequency")
    )
    assert np.array_equal(found.spread.standard_error, wanted.spread.standard_error)
    assert found.spread.settings["folds"] == [3]


def test_domains_of_recorded_folds_are_those_of_the_tables(model_folder, texts, tmp_path):
    """What was summed while recording, beside the same from single tokens."""
    acts = extract(model_folder, texts, out=tmp_path / "acts", folds=2)
    needs = replace(criteria.get("reap"), needs=criteria.get("reap").needs | Needs.DOMAINS)
    (stored,) = sources_of(needs, [acts], [None], folds=2, seed=0)
    (acts.path / "folds.safetensors").unlink()
    (made,) = sources_of(needs, [acts], [None], folds=2, seed=0)
    assert np.array_equal(stored.fold, made.fold)
    for times in (np.array([1, 1]), np.array([2, 0]), np.array([0, 3])):
        found, wanted = stored.by_domain(times), made.by_domain(times)
        assert found.domains == wanted.domains
        for name, value in wanted.arrays.items():
            assert np.allclose(found[name], value, rtol=1e-12), name


def test_halves_of_one_text_keep_what_draws_of_it_keep(tmp_path):
    """Split half of six texts: kept sets of two halves, beside the stability of draws of one."""
    fresh, drawn = zip(*(halves(seed, tmp_path / str(seed)) for seed in range(6)), strict=True)
    assert np.mean(drawn) == pytest.approx(np.mean(fresh), abs=0.15)  # chance is 0.36


def halves(seed, folder):
    """Jaccard index of what two halves of the documents keep, and the stability of the first."""
    recorded = make_recorded(n_tokens=1500, n_experts=8, seed=seed)
    recorded = recorded.changed(sample=np.arange(1500) // 10)
    half = np.random.default_rng(seed).permutation(150) < 75
    folder.mkdir()
    kept = []
    for number in range(2):
        tokens = np.flatnonzero(half[recorded.sample] == bool(number))
        _, sample = np.unique(recorded.sample[tokens], return_inverse=True)
        acts = recorded.part(tokens).changed(sample=sample).save(folder / str(number))
        made = plan(score("output_coverage", acts), drop=0.5)
        kept.append([np.isin(np.arange(8), made.keep[layer]) for layer in acts.layers])
    found = uncertainty("output_coverage", folder / "0", drop=0.5, resamples=30)
    return jaccard(np.array(kept[0]), np.array(kept[1])).mean(), found.spread.stability


def test_several_fits_of_one_recording_are_drawn_too(acts, tmp_path):
    fits = [HSDL(atoms=(6, 4), seed=seed, threads=1).fit(acts) for seed in range(3)]
    for seed, fit in enumerate(fits):
        fit.save(tmp_path / str(seed))
    found = uncertainty(
        "caep", acts, collaboration=[tmp_path / str(n) for n in range(3)], drop=0.5, resamples=30
    )
    each = [score("caep", acts, collaboration=fit, drop=0.5).values for fit in fits]
    assert np.allclose(found.values, np.mean(each, axis=0))
    assert np.array_equal(found.counts, score("frequency", acts).counts)
    assert found.activations == acts.digest()
    assert found.spread.settings["recordings"] == 3
    same = uncertainty("caep", acts, collaboration=[fits[0]] * 3, drop=0.5, resamples=30)
    assert not np.array_equal(found.spread.standard_error, same.spread.standard_error)


def test_a_fit_for_every_recording(acts, concatenated):
    fits = [patterns_of(one) for one in (acts, concatenated)]
    found = uncertainty("caep", [acts, concatenated], collaboration=fits, drop=0.5, resamples=5)
    each = [
        score("caep", one, collaboration=fit, drop=0.5).values
        for one, fit in zip((acts, concatenated), fits, strict=True)
    ]
    assert np.allclose(found.values, np.mean(each, axis=0))
    assert found.activations is None
    with pytest.raises(StaleInputError, match="fitted on activations"):
        uncertainty("caep", [acts, concatenated], collaboration=fits[::-1], drop=0.5)


def test_patterns_that_do_not_pair(acts, concatenated):
    fit = patterns_of(acts)
    with pytest.raises(SettingsError, match="'3 fits'; it must be one fit for each of the 2"):
        uncertainty("caep", [acts, concatenated], collaboration=[fit] * 3, drop=0.5)
    part = replace(fit, codes=fit.codes.take(np.arange(7)))
    with pytest.raises(ShapeError, match=r"holds codes of 7 rows, but .* has 80"):
        uncertainty("caep", acts, collaboration=part, drop=0.5)


def test_what_is_missing_is_said_before_any_work(model_folder, texts, tmp_path, monkeypatch):
    acts = extract(model_folder, texts, out=tmp_path / "acts", collect="shift")
    patched = extract(model_folder, texts, out=tmp_path / "old", collect="shift", folds=2)
    by_fold = patched.fold_tallies()
    by_fold.save(patched.path / "folds.safetensors")  # without domains

    def worked(*_args, **_settings):
        raise AssertionError("worked before checking")

    monkeypatch.setattr("moecollab.pruning.resampling.score", worked)
    monkeypatch.setattr("moecollab.pruning.draws.tallies_by", worked)
    with pytest.raises(MissingInputError, match=r"has no folds; extract again with folds=32"):
        uncertainty("easy_ep_mixed", acts, drop=0.5)
    with pytest.raises(MissingInputError, match=r"reads sums by domain, and the folds of"):
        uncertainty("easy_ep_mixed", patched, drop=0.5)
    with pytest.raises(MissingInputError, match="needs collaboration"):
        uncertainty("pattern_coverage", acts, drop=0.5)
