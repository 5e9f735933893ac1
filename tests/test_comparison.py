"""Criteria against each other: cells against the long way round, intervals and ranks by hand."""

import json
import math
import re

import numpy as np
import polars as pl
import pytest
import torch

import models
import moecollab as mc
from moecollab.errors import (
    CalibrationWarning,
    DataError,
    MissingInputError,
    SettingsError,
    StaleInputError,
)
from moecollab.evaluation.comparing.grid import Grid, calibration
from moecollab.evaluation.comparing.notes import rank_note
from moecollab.evaluation.comparing.standing import Block, critical_difference
from moecollab.models.keep import Keep
from moecollab.models.routing import find_moe_layers
from moecollab.record.corpus import read_corpus
from test_tasks import write_task

WORDS = ("court", "contract", "owl", "fox", "law", "jumps", "night", "hunt", "brown", "void", "dog")
CRITERIA = ("frequency", "esft_token", "reap", "caep", "random")
FIT = mc.HSDL(atoms=(4,), rows="token")


def documents(start, n):
    """Short documents of two domains, all different."""
    rng = np.random.default_rng(start)
    return [
        {
            "text": f"{start + i} " + " ".join(rng.choice(WORDS, 12)),
            "domain": ("law", "animals")[i % 2],
        }
        for i in range(n)
    ]


CALIBRATION, HELD_OUT = documents(0, 12), documents(100, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


def run(model, out, **changed):
    settings = {"criteria": CRITERIA, "drops": (0.25,), "per": ("layer", "model"), "seeds": 2}
    return mc.compare(model, CALIBRATION, HELD_OUT, out=out, **({"fits": FIT} | settings | changed))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    return run(folder, out), out


def test_every_cell_is_there(made):
    found, _ = made
    keys = found.cells.select("seed", "criterion", "per", "drop")
    assert keys.n_unique() == keys.height == 2 * len(CRITERIA) * 2
    assert found.measures == ["loss"]


@pytest.mark.parametrize(("criterion", "per"), [("reap", "layer"), ("caep", "model")])
def test_a_cell_is_what_the_single_steps_give(made, folder, tmp_path, criterion, per):
    found, _ = made
    part = calibration(read_corpus(CALIBRATION), 0.5, seed=1)
    acts = mc.extract(folder, part, out=tmp_path / "acts")
    collab = mc.HSDL(atoms=(4,), rows="token", seed=1).fit(acts)
    scores = mc.score(criterion, acts, collaboration=collab, drop=0.25, seed=1)
    full = mc.evaluate(folder, corpus=HELD_OUT)
    with mc.mask(folder, mc.plan(scores, drop=0.25, per=per)) as masked:
        cut = mc.evaluate(masked, corpus=HELD_OUT)
    own = found.costs().filter(seed=1, criterion=criterion, per=per)
    cost = (own["cost"] * own["size"]).sum() / own["size"].sum()
    assert cost == pytest.approx(cut.loss - full.loss, abs=1e-6)
    standing = found.standings().filter(criterion=criterion, per=per)
    assert standing["low"].item() <= standing["cost"].item() <= standing["high"].item()


def test_cuts_that_keep_the_same_experts_are_measured_once(made):
    found, out = made
    same = found.cells.filter(pl.col("criterion").is_in(["frequency", "esft_token"]), per="layer")
    assert (same.group_by("seed").agg(pl.col("cut").n_unique())["cut"] == 1).all()
    assert len(list((out / "measured").iterdir())) == found.cells["cut"].n_unique() + 1


def test_a_stopped_run_goes_on(made, folder, tmp_path):
    found, whole = made
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    done = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert len(done) == 5
    again = run(folder, out)
    assert again.cells.equals(found.cells)
    assert again.values.equals(found.values)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert mc.load_comparison(out).values.equals(mc.load_comparison(whole).values)


def stop_after(patch, n):
    """Ctrl-C when the (n+1)-th cut is measured."""
    from moecollab.evaluation.comparing import measuring

    plain, calls = measuring.document_losses, []

    def losses(*arguments, **options):
        calls.append(0)
        if len(calls) > n:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    patch.setattr(measuring, "document_losses", losses)


def test_another_run_in_the_same_folder_is_refused(made, folder):
    _, out = made
    with pytest.raises(StaleInputError, match="another share"):
        run(folder, out, share=0.7)
    with pytest.raises(StaleInputError, match="another held_out"):
        mc.compare(
            folder,
            CALIBRATION,
            documents(500, 3),
            out=out,
            fits=FIT,
            criteria=CRITERIA,
            drops=(0.25,),
            per=("layer", "model"),
            seeds=2,
        )


def test_a_run_can_be_extended(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out, criteria=("reap",), seeds=1, drops=(0.25,))
    done = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    found = run(folder, out, criteria=("reap", "frequency"), seeds=2, drops=(0.25, 0.5))
    assert found.cells.height == 2 * 2 * 2 * 2
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert found.values.equals(
        run(folder, tmp_path / "anew", criteria=("reap", "frequency"), drops=(0.25, 0.5)).values
    )
    with pytest.raises(StaleInputError, match="recorded without shift"):
        run(folder, out, criteria=("easy_ep",))


def test_a_criterion_that_changed_is_not_mixed_with_what_it_was(folder, tmp_path):
    """It is scored anew for all seeds when a run is extended."""
    own, settings = mc.criteria.Criterion, {"criteria": ("mine",), "per": ("layer",)}
    needs = mc.criteria.get("frequency").needs
    try:
        mc.criteria.register(own("mine", needs, lambda evidence, /: 1.0 * evidence.tallies.count))
        run(folder, tmp_path / "a", **settings, seeds=1)
        mc.criteria.unregister("mine")
        mc.criteria.register(own("mine", needs, lambda evidence, /: -1.0 * evidence.tallies.count))
        extended = run(folder, tmp_path / "a", **settings, seeds=2)
        fresh = run(folder, tmp_path / "b", **settings, seeds=2)
    finally:
        mc.criteria.unregister("mine")
    assert extended.cells.equals(fresh.cells)


def test_an_extension_that_fails_leaves_the_tables_as_they_were(folder, tmp_path):
    found = run(folder, tmp_path / "a", criteria=("random",), seeds=1)
    before = json.loads((tmp_path / "a" / "manifest.json").read_text())

    def boom(evidence, /):
        raise DataError("boom")

    mc.criteria.register(mc.criteria.Criterion("mine", mc.criteria.get("frequency").needs, boom))
    try:
        with pytest.raises(DataError, match="boom"):
            run(folder, tmp_path / "a", criteria=("random", "mine"), seeds=1)
    finally:
        mc.criteria.unregister("mine")
    after = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert after == before
    assert mc.load_comparison(tmp_path / "a").cells.equals(found.cells)


def test_criteria_of_patterns_can_come_later(folder, tmp_path):
    out, other = tmp_path / "out", mc.HSDL(atoms=(3,), rows="token")
    asked = {"seeds": 1, "drops": (0.25,)}
    run(folder, out, criteria=("reap",), **asked)
    both = run(folder, out, criteria=("reap", "caep"), **asked)
    anew = run(folder, tmp_path / "anew", criteria=("reap", "caep"), **asked)
    assert both.values.equals(anew.values)
    run(folder, out, criteria=("reap",), **asked)
    with pytest.raises(StaleInputError, match="another fits"):
        run(folder, out, criteria=("caep",), fits=other, **asked)
    # Another name for the first fit: its scores are not those of the other.
    run(folder, out, criteria=("caep",), fits={"other": other, "patterns": FIT}, **asked)
    scores = (out / "seed-0" / "scores").glob("caep*")
    assert {path.stem for path in scores} == {"caep@patterns-0.25", "caep@other-0.25"}


def test_text_that_calibrates_may_not_judge(folder, tmp_path):
    with pytest.raises(DataError, match="must not calibrate"):
        mc.compare(folder, CALIBRATION, [*HELD_OUT, CALIBRATION[3]], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"criteria": ("reap", "reap")}, "different names"),
        ({"criteria": ("reep",)}, "reap"),
        ({"criteria": ("caep@other",)}, "one of the fits patterns"),
        ({"criteria": ("reap@patterns",)}, "reads no patterns"),
        ({"drops": (0.0,)}, "drops is 0.0; it must be a share between 0 and 1"),
        ({"drops": (0.25, 25.0)}, "drops is 25.0; it must be a share .* for 25 % write 0.25"),
        ({"per": ("group",)}, "layer, model"),
        ({"criteria": 5}, "criteria is 5; it must be a sequence of names, or one text"),
        ({"criteria": ("reap", 5)}, "criteria is .*; it must be a sequence of names"),
        ({"per": 0.5}, "per is 0.5; it must be a sequence of names"),
        ({"drops": "0.25,0.5"}, "drops is '0.25,0.5'; it must be a share between 0 and 1"),
        ({"drops": ("0.25",)}, "drops is '0.25'; it must be a share"),
        ({"drops": None}, "drops is None; it must be a share .* or several"),
        ({"fits": {"a": 5}}, "fits is {'a': 5}; it must be an HSDL, or several by name"),
        ({"fits": 5}, "fits is 5; it must be an HSDL"),
        ({"seeds": 0}, "at least 1"),
        ({"seeds": "5"}, "seeds is '5'; it must be a whole number of at least 1"),
        ({"seeds": 2.5}, "seeds is 2.5; it must be a whole number"),
        ({"share": "0.5"}, "share is '0.5'; it must be a share"),
        ({"batch_size": "8"}, "batch_size is '8'; it must be a whole number"),
        ({"tasks": 5}, "tasks is 5; it must be a sequence of names"),
        ({"share": 1.5}, "a share between 0 and 1; .* or 1 for all documents"),
        ({"probe_tokens": 0}, "at least 1"),
        ({"context": 1}, "at least 2"),
    ],
)
def test_bad_settings_are_refused_at_once(folder, tmp_path, changed, message):
    with pytest.raises(SettingsError, match=message):
        run(folder, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_one_text_or_number_stands_for_a_list():
    found = Grid(criteria="reap, random", drops=0.25, per="layer,model")
    assert found == Grid(criteria=("reap", "random"), drops=(0.25,), per=("layer", "model"))
    assert Grid(criteria=["reap"], drops=[np.float32(0.5)], per=["layer"]).drops == (0.5,)


def test_a_pruned_folder_is_compared_and_a_masked_one_refused(folder, tmp_path):
    kept = tuple(range(6))
    layers = [one.layer for one in find_moe_layers(models.build("qwen2_moe"))]
    keep = Keep(dict.fromkeys(layers, kept), 8, 2)
    mc.prune(folder, keep, out=tmp_path / "small")
    mc.mask(folder, keep, out=tmp_path / "masked")
    only = {"criteria": "frequency", "per": "layer", "seeds": 1}
    made = run(tmp_path / "small", tmp_path / "out", **only)
    assert made.measures == ["loss"]
    with pytest.raises(DataError, match="is masked already"):
        run(tmp_path / "masked", tmp_path / "other", **only)


def test_a_loaded_model_is_left_as_it_was(tokenizer, tmp_path):
    model = models.build("qwen2_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, tmp_path / "out", tokenizer=tokenizer, criteria=("random",), seeds=1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training


def test_each_fit_serves_the_criterion_that_names_it(folder, tmp_path):
    fits = {"plain": FIT, "output": mc.HSDL(atoms=(4,), rows="token", weights="output")}
    out = tmp_path / "out"
    found = run(folder, out, fits=fits, criteria=("caep", "caep@output"), seeds=1)
    assert found.cells["criterion"].unique().sort().to_list() == ["caep", "caep@output"]
    output = mc.load_collaboration(out / "seed-0" / "fit-output")
    assert output.settings["weights"] == "output"


def test_tasks_are_answered_by_every_cut(folder, tmp_path):
    write_task(tmp_path / "tasks", tmp_path / "cache")
    found = run(
        folder,
        tmp_path / "out",
        criteria=("random",),
        tasks=("five",),
        task_folder=tmp_path / "tasks",
    )
    assert found.measures == ["loss", "five acc", "five acc_norm"]
    assert found.about["measured"]["task_folder"] == str(tmp_path / "tasks")
    row = found.standings("five acc").row(0, named=True)
    cuts = found.values.filter(pl.col("cut") != "full", measure="five acc")
    full = found.values.filter(cut="full", measure="five acc")["value"].mean()
    by_cut = dict(cuts.group_by("cut").agg(pl.col("value").mean()).iter_rows())
    own = found.cells.filter(per=row["per"])["cut"]
    assert row["cost"] == pytest.approx(full - np.mean([by_cut[cut] for cut in own]))
    assert math.isnan(row["critical"])


TEXT = "{{question}}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (TEXT, "Q: {{question}}"),
        ("doc_to_choice: choices", 'doc_to_choice: ["yes", "no", "maybe"]'),
        ("doc_to_target: answer", "doc_to_target: 1"),
        ("test_split: test", "test_split: test\nfewshot_split: test\nnum_fewshot: 2"),
        ("test_split: test", 'test_split: test\ndescription: "Answer. "'),
        ("test_split: test", 'test_split: test\ntarget_delimiter: ": "'),
        (" + 1 =", " plus 1 ="),
    ],
)
def test_tasks_that_changed_are_not_mixed(folder, tmp_path, old, new):
    tasks = tmp_path / "tasks"
    asked = {"tasks": ("five",), "task_folder": tasks, "seeds": 1, "per": ("layer",)}
    write_task(tasks, tmp_path / "cache")
    run(folder, tmp_path / "out", criteria=("random",), **asked)
    write_task(tasks, tmp_path / "other_cache")
    for file in tasks.iterdir():
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(StaleInputError, match="a comparison with another tasks;"):
        run(folder, tmp_path / "out", criteria=("random", "reap"), **asked)
    manifest = tmp_path / "out" / "manifest.json"  # as it was before it held the tasks' digest
    older = json.loads(manifest.read_text())
    del older["inputs"]["tasks"]
    manifest.write_text(json.dumps(older))
    with pytest.raises(DataError, match="answered other questions than the full model"):
        run(folder, tmp_path / "out", criteria=("random", "reap"), **asked)


def test_other_files_in_the_task_folder_do_not_matter(folder, tmp_path):
    tasks = tmp_path / "tasks"
    asked = {"tasks": ("five",), "task_folder": tasks, "seeds": 1, "per": ("layer",)}
    write_task(tasks, tmp_path / "cache")
    run(folder, tmp_path / "out", criteria=("random",), **asked)
    write_task(tasks, tmp_path / "cache", name="another", text="Q: {{question}}")
    run(folder, tmp_path / "out", criteria=("random", "reap"), **asked)


def test_runs_of_before_prompts_were_kept_go_on(folder, tmp_path):
    """Neither the manifest nor the measurements of an older run say in which words they asked."""
    out = tmp_path / "out"
    asked = {"tasks": ("five",), "task_folder": tmp_path / "tasks", "seeds": 1}
    write_task(tmp_path / "tasks", tmp_path / "cache")
    before = run(folder, out, criteria=("random",), **asked)
    older = json.loads((out / "manifest.json").read_text())
    del older["inputs"]["tasks"], older["measured"]
    (out / "manifest.json").write_text(json.dumps(older))
    for file in (out / "measured").iterdir():
        found = json.loads(file.read_text())
        for task in found["tasks"]:
            del task["prompts"]
        file.write_text(json.dumps(found))
    assert mc.load_comparison(out).values.equals(before.values)
    found = run(folder, out, criteria=("random", "reap"), **asked)
    assert found.cells.height == 2 * before.cells.height


def test_every_cut_is_asked_with_the_same_examples(folder, tmp_path):
    tasks, cuts = tmp_path / "tasks", tmp_path / "out" / "measured"
    write_task(tasks, tmp_path / "cache")
    yaml = tasks / "five.yaml"
    yaml.write_text(yaml.read_text() + "fewshot_split: test\nnum_fewshot: 2\n")
    asked = {"tasks": ("five",), "task_folder": tasks, "seeds": 1}
    run(folder, tmp_path / "out", criteria=("random", "reap"), **asked)
    prompts = {
        task["prompts"] for f in cuts.iterdir() for task in json.loads(f.read_text())["tasks"]
    }
    assert len(list(cuts.iterdir())) > 2
    assert len(prompts) == 1


def test_seeds_that_calibrate_on_the_same_documents_are_told(folder, tmp_path):
    """One warning, and a sentence under the table: with all documents, and with one a domain."""
    every = "Every seed calibrates on the same documents, so the intervals"
    with pytest.warns(CalibrationWarning, match=every) as caught:
        found = run(folder, tmp_path / "all", criteria=("reap", "random"), share=1.0)
    assert len(caught) == 1
    assert "one says as much" not in str(caught[0].message)
    assert found.notes()[1].startswith(every)
    assert found.notes()[2] == "All seeds made the same cuts by reap."
    with pytest.warns(CalibrationWarning, match="None of these criteria depends on the seed"):
        run(folder, tmp_path / "same", criteria=("reap", "frequency"), share=1.0)
    lonely = [*CALIBRATION, {"text": "the court held that the owl", "domain": "lonely"}]
    asked = {"out": tmp_path / "one", "criteria": ("reap",), "drops": (0.25,), "seeds": 2}
    with pytest.warns(CalibrationWarning, match=r"in 1 of 3 domains \(lonely\)"):
        found = mc.compare(folder, lonely, HELD_OUT, **asked)
    assert found.notes()[1].startswith("Every seed calibrates on the same documents in 1 of 3")
    assert len(found.notes()) == 2


def test_one_seed_is_said_and_draws_no_warning(folder, tmp_path):
    found = run(folder, tmp_path / "out", criteria=("reap", "random"), seeds=1, share=1.0)
    assert found.notes()[1].startswith("There is one calibration, so the intervals speak of other")
    assert len(found.notes()) == 2


@pytest.mark.parametrize(
    ("n_criteria", "n_domains", "words"),
    [
        (1, 9, "one criterion, so there are no ranks"),
        (5, 1, "one domain, so ranks cannot be told apart"),
        (2, 3, "over 3 domains are not told apart, however far they lie; it takes 4 or more"),
        (12, 20, "differ by less than 3.73 are not told apart .*20 domains"),
    ],
)
def test_ranks_that_no_test_could_tell_apart_are_said(n_criteria, n_domains, words):
    assert re.search(words, rank_note(n_criteria, n_domains))


def test_the_least_number_of_domains_is_the_least():
    for n_criteria in range(2, 13):
        told = [n for n in range(2, 40) if "differ by" in rank_note(n_criteria, n)]
        for n in range(2, told[0]):
            assert f"it takes {told[0]} or more" in rank_note(n_criteria, n)


def test_the_seeds_draw_other_documents_of_every_domain():
    corpus = read_corpus(CALIBRATION)
    first, second = (calibration(corpus, 0.5, seed) for seed in (0, 1))
    assert len(first) == len(second) == 6
    assert first.domains == corpus.domains
    assert {d.id for d in first.documents} != {d.id for d in second.documents}
    assert calibration(corpus, 1.0, 0).documents == corpus.documents
    assert len(calibration(corpus, 0.01, 0)) == 2


def test_what_a_grid_needs_is_known_beforehand():
    grid = Grid(criteria=("caep@b", "reap"), fits={"a": FIT, "b": FIT})
    assert grid.fits_needed() == ["b"]
    assert grid.cells == 3 * 2 * 2


def block(worse, domain=(0, 0, 1)):
    worse = np.asarray(worse, np.float64)
    return Block(
        [f"c{i}" for i in range(len(worse))],
        worse,
        np.asarray([1.0, 2.0, 3.0]),
        np.asarray(domain),
    )


def test_costs_and_ranks_by_hand():
    """Two criteria, two seeds, three items of sizes 1, 2 and 3 in two domains."""
    found = block([[[1, 2, 6], [3, 0, 0]], [[1, 2, 0], [1, 2, 2]]])
    np.testing.assert_allclose(found.costs(), [6 / 6, 4 / 6])  # (9 + 3) / 2 and (3 + 5) / 2
    ranks, critical = found.ranks()  # first domain 3 and 3, second domain 3 and 1
    np.testing.assert_allclose(ranks, [(1.5 + 2) / 2, (1.5 + 1) / 2])
    assert critical == pytest.approx(1.960 * math.sqrt(2 * 3 / (6 * 2)), abs=1e-3)


def test_draws_are_those_of_a_slow_bootstrap():
    """The same spread as drawing seeds, and documents within domains, one after the other."""
    rng = np.random.default_rng(0)
    worse, size = rng.normal(1, 1, (2, 4, 30)), rng.integers(1, 9, 30).astype(float)
    domain = np.repeat([0, 1, 2], 10)
    fast = Block(["a", "b"], worse, size, domain).draws(0, 4_000)
    slow = np.empty((4_000, 2))
    for row in slow:
        seeds = rng.integers(4, size=4)
        items = np.concatenate([rng.integers(10, size=10) + 10 * d for d in range(3)])
        row[:] = worse[:, seeds][:, :, items].mean(axis=1).sum(axis=1) / size[items].sum()
    for moment in (np.mean, np.std):
        np.testing.assert_allclose(moment(fast, axis=0), moment(slow, axis=0), rtol=0.05)
    gap = [np.std(draws[:, 0] - draws[:, 1]) for draws in (fast, slow)]
    assert gap[0] == pytest.approx(gap[1], rel=0.05)


def test_critical_values_are_those_of_the_published_table():
    """Demšar 2006, table 5a: q at 5 % for 2 to 10 classifiers."""
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for n, q in enumerate(table, start=2):
        scale = math.sqrt(n * (n + 1) / (6 * 10))
        assert critical_difference(n, 10) / scale == pytest.approx(q, abs=1e-3)
    assert math.isnan(critical_difference(1, 10))


def test_standings_hold_a_reference(made):
    found, _ = made
    table = found.standings(reference="random").filter(per="layer")
    own = table.filter(criterion="random")
    assert own.select("difference", "difference_low", "difference_high").row(0) == (0, 0, 0)
    gaps = table["cost"] - own["cost"].item()
    np.testing.assert_allclose(table["difference"], gaps, atol=1e-12)
    assert table["cost"].is_sorted()
    with pytest.raises(SettingsError, match="random"):
        found.standings(reference="randon")
    with pytest.raises(SettingsError, match="loss"):
        found.standings("los")


def test_a_damaged_or_unfinished_comparison_says_so(made, folder, tmp_path):
    with pytest.raises(DataError, match="manifest"):
        mc.load_comparison(tmp_path)
    out = tmp_path / "out"
    run(folder, out, criteria=("random",), seeds=1)
    (out / "cells.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="goes on where it was"):
        mc.load_comparison(out)


def test_a_criterion_whose_needs_cannot_be_recorded_is_named(folder, tmp_path):
    found = run(folder, tmp_path / "out", criteria=("easy_ep", "soft_routing"), seeds=1)
    assert found.cells.height == 4
    with pytest.raises(MissingInputError):
        mc.score("easy_ep", mc.extract(folder, CALIBRATION, out=tmp_path / "acts"))


def test_the_figure_has_a_line_per_criterion_and_budget(made):
    figure = mc.comparison_figure(made[0])
    assert len(figure.data) == 2 * len(CRITERIA)
    assert {line.name for line in figure.data} == set(CRITERIA)
