"""Commands as a user meets them: one clear sentence and exit code 1 for what goes wrong."""

import html
import json
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest
import yaml

import models
import moecollab as mc
from moecollab.cli.main import main
from moecollab.demo import MODEL


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "moecollab", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_help_lists_every_verb():
    found = run("--help")
    assert found.returncode == 0
    for verb in (
        "extract",
        "fit",
        "mine",
        "score",
        "plan",
        "mask",
        "prune",
        "evaluate",
        "report",
        "demo",
    ):
        assert verb in found.stdout


def test_usage_error_is_exit_code_two():
    assert run("plan").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "nowhere", "--out", "c"], "nowhere"),
        (["mine", "nowhere", "--out", "m"], "nowhere"),
        (["plan", "nowhere.parquet", "--drop", "0.2", "--out", "p.json"], "nowhere.parquet"),
        (["score", "nowhere", "--criterion", "caap", "--out", "s.parquet"], "caep"),
        (["report", "nowhere", "--out", "r.html"], "nowhere"),
    ],
)
def test_one_sentence_and_exit_code_one(arguments, sentence, tmp_path):
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.strip().splitlines()) == 1
    assert sentence in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def inside(monkeypatch, capsys, tmp_path):
    """Runs a command in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moecollab", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        return left.value.code or 0, shown.out, shown.err

    return call


def refused(result, *words):
    code, _, error = result
    assert code == 1, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    documents = [{"text": "The quick brown fox. " * n, "domain": f"d{n % 2}"} for n in (1, 2, 3, 4)]
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


def test_the_verbs_in_a_row(inside, model_folder, text, tmp_path):
    run = tmp_path / "run"
    acts, collab, scores = run / "activations", run / "collaboration", run / "scores/caep.parquet"
    plan, masked, pruned = run / "plan.json", run / "masked", run / "pruned"
    for command in (
        ["extract", model_folder, text, "--out", acts],
        ["fit", acts, "--out", collab, "--atoms", "3,4", "--rows", "sample"],
        ["mine", acts, "--out", tmp_path / "pairs", "--null", "token"],
        ["score", acts, "--criterion", "caep", "--collaboration", collab, "--out", scores],
        ["plan", scores, "--drop", "0.25", "--out", plan],
        ["mask", model_folder, plan, "--out", masked],
        ["evaluate", model_folder, "--corpus", text, "--out", run / "evaluations/full.json"],
        ["evaluate", masked, "--corpus", text, "--out", run / "evaluations/caep-25.json"],
        ["prune", model_folder, plan, "--out", pruned],
        ["evaluate", pruned, "--corpus", text, "--out", run / "pruned.json"],
        ["report", run, "--out", run / "report.html"],
    ):
        code, out, error = inside(*command)
        assert code == 0, error
        assert len(out.strip().splitlines()) == 1, out
    tried = mc.load_evaluation(run / "evaluations/caep-25.json")
    cut = mc.load_evaluation(run / "pruned.json")
    assert tried.loss == pytest.approx(cut.loss, abs=1e-6)
    for found in (tried, cut):  # neither can be mistaken for the full model
        assert found.plan["settings"]["criterion"] == "caep"
        assert found.plan["keep"] == tried.plan["keep"]
    assert (run / "report.html").stat().st_size > 1_000_000


def test_bad_input_is_one_sentence_and_writes_nothing(inside, model_folder, text, tmp_path):
    out = tmp_path / "out"
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n ")
    dense = tmp_path / "dense"
    models.build_dense().save_pretrained(dense)
    models.build_tokenizer().save_pretrained(dense)
    refused(inside("extract", model_folder, blank, "--out", out), "no text")
    refused(inside("extract", dense, text, "--out", out), "dense")
    refused(inside("extract", tmp_path / "gone", text, "--out", out), "gone")
    refused(inside("evaluate", model_folder, "--out", out), "corpus")
    config = json.loads((dense / "config.json").read_text()) | {"model_type": "weird_moe"}
    (dense / "config.json").write_text(json.dumps(config))
    refused(
        inside("extract", dense, text, "--out", out), "weird_moe", "qwen3_moe", "register_layout"
    )
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    refused(inside("extract", model_folder, text, "--out", precious, "--overwrite"), "precious")
    assert (precious / "thesis.txt").exists()
    assert not out.exists()


def test_version(inside):
    assert inside("--version")[:2] == (0, f"moecollab {mc.__version__}\n")


def test_misspelt_sums_are_answered_with_near_names(inside, model_folder, text):
    for asked, near in (("chanels", "channels"), ("pairs, raep", "reap"), ("vocab", "vocabulary")):
        refused(
            inside("extract", model_folder, text, "--out", "out", "--collect", asked),
            f"did you mean {near}",
        )
    asked = "pairs, reap,preferences"
    assert inside("extract", model_folder, text, "--out", "out", "--collect", asked)[0] == 0


@pytest.mark.parametrize("gigabytes", ["0.5", "1.0"])
def test_memory_for_hidden_states_needs_layer_by_layer(inside, model_folder, text, gigabytes):
    made = ["extract", model_folder, text, "--out", "out", "--hidden-gb", gigabytes]
    code, _, error = inside(*made)
    assert code == 2
    assert "'--hidden-gb': it works with --layer-by-layer; give both or leave it out" in error
    assert inside(*made, "--layer-by-layer")[0] == 0


def test_a_context_beyond_the_models_own_is_said(inside, model_folder, text):
    said = "read in pieces of 64 tokens, not 100: the model has no more places"
    for asked in ("100", "64"):
        made = ["extract", model_folder, text, "--out", f"acts{asked}", "--context", asked]
        tried = ["evaluate", model_folder, "--corpus", text, "--out", f"{asked}.json"]
        for command in (made, [*tried, "--context", asked]):
            code, _, error = inside(*command)
            assert code == 0, error
            assert (said in " ".join(error.split())) == (asked == "100")


def test_a_lower_context_is_said_before_the_work(inside, model_folder, tmp_path):
    """Both commands refuse the text once they know the model, and have said it by then."""
    said = "read in pieces of 64 tokens, not 100"
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "a"}))
    short = str(tmp_path / "short.jsonl")
    made = ["extract", model_folder, short, "--out", "acts", "--folds", "2"]
    tried = ["evaluate", model_folder, "--corpus", short, "--out", "e.json"]
    for command in (made, tried):
        code, _, error = inside(*command, "--context", "100")
        assert code == 1, error
        assert said in " ".join(error.split())


def test_damaged_files_and_impossible_plans(inside, model_folder, text, tmp_path):
    acts, scores = tmp_path / "acts", tmp_path / "scores.parquet"
    assert inside("extract", model_folder, text, "--out", acts)[0] == 0
    refused(inside("extract", model_folder, text, "--out", acts), "exists")
    made = ["score", acts, "--criterion", "frequency", "--out", scores]
    assert inside(*made)[0] == 0
    refused(inside("plan", scores, "--drop", "0.9", "--out", "plan.json"), "top_k=2", "0.75")
    refused(inside("fit", acts, "--out", "c", "--atoms", "4,x"), "atoms")
    weights = acts / "tallies.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(inside(*made, "--overwrite"), "tallies.safetensors")
    scores.write_bytes(scores.read_bytes()[:50])
    refused(inside("plan", scores, "--drop", "0.5", "--out", "plan.json"), "scores.parquet")
    assert not (tmp_path / "plan.json").exists()


def test_sweep_leaves_a_table_and_a_figure(inside, acts, tmp_path):
    out = tmp_path / "sweep"
    made = ["sweep", acts.path, "--out", out, "--held-out", "0.5", "--threads", "1"]
    code, said, error = inside(*made, "--atoms", "4,6", "--reconstruction", "30,300")
    assert code == 0, error
    assert "4 fits" in said
    assert pl.read_parquet(out / "sweep.parquet")["seed"].to_list() == [0, 1, 0, 1]
    assert "agreement between seeds" in (out / "sweep.html").read_text()
    refused(inside(*made, "--overwrite"), "--atoms")
    refused(inside(*made, "--overwrite", "--sparsity", "1,x"), "sparsity", "100,300")


def test_ctrl_c_is_one_sentence(inside, monkeypatch, text, model_folder):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mc, "extract", stop)
    code, _, error = inside("extract", model_folder, text, "--out", "out")
    assert code == 130
    assert "go on where they were" in error


def test_interrupted_fit_keeps_the_best_and_says_so(inside, monkeypatch, text, model_folder):
    assert inside("extract", model_folder, text, "--out", "acts")[0] == 0
    whole = mc.HSDL.fit

    def interrupted(settings, acts, **options):
        return replace(whole(settings, acts, **options), stop_reason="interrupted")

    monkeypatch.setattr(mc.HSDL, "fit", interrupted)
    command = ("fit", "acts", "--out", "c", "--atoms", "2,3", "--rows", "sample")
    code, _, error = inside(*command)
    assert code == 130
    assert "holds the best so far, --overwrite fits again" in error
    assert mc.load_collaboration("c").stop_reason == "interrupted"
    refused(inside(*command), "--overwrite")


def test_model_path_that_is_not_there(inside, text):
    refused(
        inside("extract", "no/such/model", text, "--out", "acts"), "no/such/model does not exist"
    )


def test_weights_are_scored_without_a_recording(inside, model_folder):
    code, shown, _ = inside(
        "score", "--model", model_folder, "--criterion", "aimer", "--out", "aimer.parquet"
    )
    assert (code, "Scores(aimer: 3 layers × 8 experts" in shown) == (0, True)
    assert mc.load_scores("aimer.parquet").activations is None
    plan = mc.plan("aimer.parquet", drop=0.25)
    assert (plan.activations, plan.n_dropped) == (None, 6)
    code, _, said = inside("score", "--criterion", "aimer", "--out", "other.parquet")
    assert (code, said.count("\n")) == (1, 1)
    assert "needs weights, which is not there; pass the model: model= (--model)" in said


def test_criteria_lists_every_one(inside):
    code, shown, _ = inside("criteria")
    assert code == 0
    for words in ("no data: ", "easy_ep ", "needs routing, shift", "Which to use: "):
        assert words in shown


def write_texts(folder):
    """Text that calibrates and text that judges, of two domains."""
    for name, n in (("calibration", 6), ("held_out", 3)):
        lines = [
            {"text": f"{name} {i}: the court held that the owl hunts.", "domain": "ab"[i % 2]}
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "calibration.jsonl", "--held-out", folder / "held_out.jsonl"


def test_compare_prints_a_table_and_leaves_a_page(inside, model_folder, tmp_path):
    out = tmp_path / "out"
    made = ["compare", model_folder, *write_texts(tmp_path), "--criteria", "reap,random"]
    made += ["--drops", "0.25", "--per", "layer,model", "--seeds", "2", "--out", out]
    code, said, error = inside(*made)
    assert code == 0, error
    for wanted in ("cost of dropping 25.0% per layer", "per model", "reap", "mean rank"):
        assert wanted in said
    assert "Mean ranks over 2 domains are not told apart, however far they lie" in said
    assert "share of experts dropped" in (out / "comparison.html").read_text()
    assert pl.read_parquet(out / "costs.parquet").height == 2 * 2 * 2 * 2
    assert inside(*made)[0] == 0  # again: the page is written anew


def test_compare_reads_fits_from_a_file(inside, model_folder, tmp_path):
    out, fits = tmp_path / "out", tmp_path / "fits.yaml"
    made = ["compare", model_folder, *write_texts(tmp_path), "--criteria", "caep,caep@output"]
    made += ["--drops", "0.25", "--seeds", "1", "--out", out, "--fits", fits]
    fits.write_text("output: {rows: token, weights: output, atoms: [4, 6]}\nplain: {atoms: [3]}\n")
    code, _, error = inside(*made)
    assert code == 0, error
    read = mc.load_collaboration(out / "seed-0" / "fit-output")
    assert (read.settings["weights"], [len(level.atoms) for level in read.levels]) == (
        "output",
        [4, 6],
    )
    assert not (out / "seed-0" / "fit-plain").exists()
    page = (out / "comparison.html").read_text()
    assert "--fits fits.yaml" in page
    told = html.unescape(page.split("fits.yaml:</p>")[1].split("<pre>")[1].split("</pre>")[0])
    assert yaml.safe_load(told) == {"output": {"atoms": [4, 6], "weights": "output"}}
    for text, words in (
        ("output: {wieghts: output}", ("setting of a fit is 'wieghts'", "did you mean weights")),
        ("output: {seed: 3}", ("setting of a fit is 'seed'",)),
        ("output: [1", ("cannot be read as YAML", "rows: sample")),
        ("- output", ("names with settings", "rows: sample")),
        ("{}", ("holds no fit", "rows: sample")),
    ):
        fits.write_text(text)
        refused(inside(*made), *words)
    fits.unlink()
    refused(inside(*made), "cannot be read")


def test_the_embedded_model_has_a_name(inside, text, tmp_path):
    """Every command that takes a model takes it; a folder of that name is ./embedded."""
    (tmp_path / "embedded").mkdir()
    assert inside("extract", "embedded", text, "--out", "acts", "--tokens", "20")[0] == 0
    assert mc.load_activations("acts").manifest["model"]["path"] == str(MODEL)
    made = ["score", "--model", "embedded", "--criterion", "aimer", "--out", "aimer.parquet"]
    assert inside(*made)[0] == 0
    refused(inside("extract", "./embedded", text, "--out", "other"), "embedded")


@pytest.mark.parametrize(("option", "value"), [("--drops", "25"), ("--share", "50")])
def test_percent_for_a_share_is_told(inside, model_folder, tmp_path, option, value):
    made = ["compare", model_folder, *write_texts(tmp_path), "--out", "out", option, value]
    refused(inside(*made), "a share between 0 and 1; for 25 % write 0.25")
    refused(inside("plan", "none.parquet", "--drop", "25", "--out", "p"), "for 25 % write 0.25")
