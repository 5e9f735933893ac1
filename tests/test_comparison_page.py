"""The page of a comparison: numbers against the tables, escaping, older and damaged folders."""

import json
import re
import shlex

import polars as pl
import pytest
import typer

import moecollab as mc
from moecollab.cli.comparing import _shares
from moecollab.cli.main import app
from moecollab.errors import OutputExistsError
from moecollab.evaluation.comparing.comparison import CELLS, VALUES
from moecollab.evaluation.comparing.grid import Grid
from moecollab.reporting.comparison_page import _command, render

SHARES = (0.25, 0.5)
NAMES = ("reap", "<b>odd</b>", "random")
ABOUT = {
    "settings": {
        "criteria": list(NAMES),
        "drops": list(SHARES),
        "per": ["layer", "model"],
        "seeds": 2,
        "share": 0.5,
        "fits": {"b": {"rows": "sample", "atoms": [3]}, "a": {"rows": "token"}},
        "tasks": ["five"],
        "limit": 4,
        "context": 512,
        "batch_size": 8,
        "probe_tokens": 8192,
    },
    "inputs": {"model": "m0", "corpus": "c0", "held_out": "h0"},
    "versions": {"moecollab": "0.1.0"},
    "measured": {
        "model": {
            "path": "models/my olmoe",
            "model_type": "olmoe",
            "class": "Olmoe",
            "layers": [0, 1],
            "n_experts": 8,
            "top_k": 2,
        },
        "dtype": "float32",
        "task_folder": "my tasks",
        "fit": "b",
        "calibration": {"documents": [6, 6], "tokens": [70, 71], "domains": 2, "alike": []},
    },
}


def comparison(about=ABOUT):
    """Three criteria, two budgets and shares, two seeds; losses and one task, by formula."""
    cells, values = [], []
    for item, domain in (("a", "law"), ("b", "<i>law"), ("c", "owls")):
        values.append(("full", "loss", item, domain, 10.0, 30.0, 0.0))
    values += [("full", "five acc", f"{q}", "five", 1.0, 1.0, 0.0) for q in range(4)]
    for number, name in enumerate(NAMES):
        for per in ("layer", "model"):
            for drop in SHARES:
                for seed in (0, 1):
                    cut = f"{number}{per}{drop}{seed}"
                    cells.append((seed, name, per, drop, cut, 2))
                    worse = 10 * drop * (1 + number + 0.1 * seed)
                    for item, domain in (("a", "law"), ("b", "<i>law"), ("c", "owls")):
                        values.append((cut, "loss", item, domain, 10.0, 30 + worse, worse))
                    for q in range(4):
                        lost = float(q < number)
                        values.append((cut, "five acc", f"{q}", "five", 1.0, 1 - lost, lost))
    return mc.Comparison(
        pl.DataFrame(cells, schema=CELLS, orient="row"),
        pl.DataFrame(values, schema=VALUES, orient="row"),
        about,
    )


@pytest.fixture(scope="module")
def page():
    return render(comparison())


def numbers(page):
    return json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL)[1])


def test_every_cost_on_the_page_is_that_of_the_table(page):
    found, shown = comparison(), numbers(page)
    for key, measure in (("loss", "loss"), ("task1", "five acc")):
        for row in found.standings(measure).iter_rows(named=True):
            place = f"{key}.{row['per']}.{row['drop']:g}.{row['criterion']}"
            for column in ("cost", "low", "high"):
                assert shown[f"{place}.{column}"] == row[column]
    assert shown["loss.layer.0.25.reap.cost"] == pytest.approx(0.25 * 1.05)
    assert shown["task1.model.0.5.random.cost"] == 0.5


def test_it_says_what_was_measured(page):
    shown = numbers(page)
    assert shown["held_out.documents"] == 3
    assert shown["held_out.tokens"] == 30
    assert shown["held_out.domains"] == 3
    assert (shown["seeds"], shown["calibration.tokens"], shown["calibration.documents"]) == (
        2,
        70,
        6,
    )
    assert "What each criterion's cuts cost: my olmoe" in page.replace("&#39;", "'")
    assert "differ by less than 1.91 are not told apart" in page
    assert "There is one domain, so ranks cannot be told apart" in page  # the task


def test_the_findings_name_the_best(page):
    first = re.search(r'<ul class="findings">(.*?)</ul>', page, re.DOTALL)[1]
    assert first.count("<b>reap</b> costs least") == 4
    assert first.count("All others cost more") == 4


def test_a_reference_is_what_others_are_held_against():
    page = render(comparison(), reference="random")
    assert "more than random" in page
    assert "which was named as the reference" in page
    assert "Not told apart" not in page


def test_names_are_shown_as_they_are(page):
    body = page.split("</head>")[1]
    assert "<b>odd" not in body
    assert "&lt;b&gt;odd&lt;/b&gt;" in body


def test_the_command_repeats_it():
    said = _command(ABOUT).replace(" \\\n   ", "")
    assert said == (
        "moecollab compare 'models/my olmoe' CALIBRATION --held-out HELD_OUT "
        "--criteria 'reap,<b>odd</b>,random' --drops 0.25,0.5 --per layer,model --tasks five "
        "--task-folder 'my tasks' --seeds 2 --share 0.5 --limit 4 --probe-tokens 8192 "
        "--context 512 --batch-size 8 --dtype float32 --fits fits.yaml --out run/comparison"
    )


def parsed(about):
    """What the command line would hand on to ``compare``, and its settings as a manifest's."""
    words = shlex.split(_command(about).replace("\\\n", " "))
    got = typer.main.get_command(app).commands["compare"].make_context("compare", words[2:]).params
    got["model"], got["tasks"] = str(got["model"]), list(got["tasks"] or ())
    got["task_folder"] = got["task_folder"] and str(got["task_folder"])
    grid = Grid(
        criteria=got["criteria"],
        drops=_shares(got["drops"]),
        per=got["per"],
        seeds=got["seeds"],
        share=got["share"],
    )
    return got, grid.as_json()


@pytest.mark.parametrize("folder", [None, "my tasks"])
def test_the_command_line_reads_the_same_settings(folder):
    odd = {"criteria": ["reap", "random"], "drops": [1 / 3, 0.25, 1e-05], "share": 2 / 3}
    odd |= {"probe_tokens": 2_000_000, "limit": None if folder else 1_234_567, "fits": {}}
    settings = ABOUT["settings"] | odd
    measured = ABOUT["measured"] | {"task_folder": folder}
    got, grid = parsed(ABOUT | {"settings": settings, "measured": measured})
    plain = ("tasks", "limit", "context", "batch_size", "probe_tokens")
    assert {name: settings[name] for name in plain} == {name: got[name] for name in plain}
    tried = ("criteria", "drops", "per", "seeds", "share")
    assert {name: settings[name] for name in tried} == {name: grid[name] for name in tried}
    assert (got["model"], got["dtype"]) == ("models/my olmoe", "float32")
    assert got["task_folder"] == folder


def test_fits_stand_in_the_order_in_which_they_are_read(page):
    told = page.split("fits.yaml:</p>")[1].split("</pre>")[0]
    assert told.index("b:") < told.index("a:")


def test_a_comparison_without_a_manifest_is_shown(tmp_path):
    """As one made by hand, or by a version that kept no sizes."""
    older = {key: value for key, value in ABOUT.items() if key != "measured"}
    for about in ({}, older):
        page = render(comparison(about))
        assert "<h1>What each criterion" in page
        assert "layers × experts" not in page


def test_the_page_is_not_replaced_unasked(tmp_path):
    out = tmp_path / "page.html"
    assert mc.comparison_page(comparison(), out, title="<T>") == out
    assert "<h1>&lt;T&gt;</h1>" in out.read_text()
    with pytest.raises(OutputExistsError):
        mc.comparison_page(comparison(), out)
    mc.comparison_page(comparison(), out, overwrite=True)
