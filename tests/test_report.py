"""The report: its numbers are those of the files, its text is escaped, missing parts are said."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from moecollab.criteria.scores import load_scores
from moecollab.errors import DataError, MissingInputError, OutputExistsError, StaleInputError
from moecollab.evaluation.differences import differences
from moecollab.evaluation.evaluation import Evaluation, load_evaluation
from moecollab.evaluation.repetition import ends_in_loop, longest_loop
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.rankings import agreement
from moecollab.reporting import numbers
from moecollab.reporting.costs import costs_of
from moecollab.reporting.drops import drops_of
from moecollab.reporting.expert_use import ExpertUse
from moecollab.reporting.figures.experts import score_strip, use_map
from moecollab.reporting.findings import cost_findings
from moecollab.reporting.history import fit_history
from moecollab.reporting.material import gather
from moecollab.reporting.numbers import Ledger
from moecollab.reporting.page import report
from moecollab.reporting.pattern_cards import best_window
from moecollab.reporting.provenance import commands
from report_run import (
    CRITERIA,
    DOMAINS,
    LAYERS,
    N_EXPERTS,
    SURE,
    TOP_K,
    WROTE,
    write_activations,
    write_run,
)

UNSHOWN = ("n_sites", "resamples")
"""What the page says of the first resampled scores alone."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(run):
    return report(run / "report.html", run=run).read_text()


class Numbers(HTMLParser):
    """The block of numbers of a page, and every printed number with its name and text."""

    def __init__(self, text):
        super().__init__()
        self.printed, self.block, self._in = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "data":
            self._in = (attrs["data-key"], float(attrs["value"]))
        elif tag == "script" and attrs.get("id") == "numbers":
            self._in = "block"

    def handle_data(self, data):
        if self._in == "block":
            self.block += data
        elif self._in is not None:
            self.printed.append((*self._in, data))

    def handle_endtag(self, tag):
        if tag in ("data", "script"):
            self._in = None


def shares(weight):
    return weight / weight.sum(axis=-1, keepdims=True)


def expected_use(run):
    """What the page should say of the recording, from its files."""
    sums = load_file(run / "activations" / "tallies.safetensors")
    overall, inside = shares(sums["sum_weight"].sum(axis=0)), shares(sums["sum_weight"])
    mixed = inside.mean(axis=0)

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)

    divergence = (entropy(mixed) - entropy(inside).mean(axis=0)) / np.log(len(DOMAINS))
    busiest = np.sort(overall.ravel())[::-1][: round(0.1 * overall.size)].sum() / overall.sum()
    found = {
        "run.n_layers": len(LAYERS),
        "run.n_experts": N_EXPERTS,
        "run.top_k": TOP_K,
        "run.n_tokens": pl.read_parquet(run / "activations" / "tokens.parquet").height,
        "run.n_samples": pl.read_parquet(run / "activations" / "samples.parquet").height,
        "run.n_domains": len(DOMAINS),
        "use.even_share": 1 / N_EXPERTS,
        "use.busiest_tenth": busiest,
        "use.most_divergent_layer": LAYERS[int(divergence.argmax())],
    }
    found |= {f"use.divergence.{layer}": x for layer, x in zip(LAYERS, divergence, strict=True)}
    return found, overall


def expected_drops(run, overall):
    """What it should say of the plan, from the plan's and the scores' files."""
    plan = json.loads((run / "plan.json").read_text())
    scores = pl.read_parquet(run / "scores" / "caep-25.parquet")
    found, gone, lost = {"plan.n_sites": overall.size, "plan.drop": 0.25}, 0, 0.0
    for layer, expert, score in scores.select("layer", "expert", "score").iter_rows():
        if expert in plan["keep"][str(layer)]:
            continue
        use = overall[LAYERS.index(layer), expert]
        found |= {
            f"dropped.{layer}.{expert}.score": score,
            f"dropped.{layer}.{expert}.use": use,
        }
        gone, lost = gone + 1, lost + use
    return found | {"plan.n_dropped": gone, "drops.use_lost": lost / overall.sum()}


def expected_costs(run):
    """What it should say of losses, from the evaluations' files."""
    tables = {
        path.stem: json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")
    }
    loss = {
        name: sum(table["documents"]["nll"]) / sum(table["documents"]["tokens"])
        for name, table in tables.items()
    }
    full = tables["full"]["documents"]
    found = {
        "cost.full.loss": loss["full"],
        "cost.documents": len(full["nll"]),
        "cost.tokens": sum(full["tokens"]),
    }
    for name in set(tables) - {"full"}:
        found[f"cost.{name}.drop"] = int(name[-2:]) / 100
        found[f"cost.{name}.loss"] = loss[name]
        found[f"cost.{name}.difference"] = loss[name] - loss["full"]
    for ours in ("caep-25", "caep-50"):
        for other in CRITERIA:
            name = f"{other}-{ours[-2:]}"
            found[f"gap.{ours}.{name}.difference"] = loss[ours] - loss[name]
    return found


def expected_patterns(run):
    """What it should say of patterns, from the collaboration's files."""
    arrays = load_file(run / "collaboration" / "atoms.safetensors")
    history = json.loads((run / "collaboration" / "history.json").read_text())
    rows = history["history"] if isinstance(history, dict) else history
    found = {"fit.objective": rows[-1]["total"]}
    for level in (1, 2):
        atoms, usage, peak = (arrays[f"level{level}.{name}"] for name in ("atoms", "usage", "peak"))
        live = peak > 0
        found |= {f"patterns.{level}.live": live.sum(), f"patterns.{level}.atoms": len(atoms)}
        found[f"patterns.{level}.joined"] = ((atoms[live] >= 0.5).sum(axis=1) > 1).sum()
        for atom in np.flatnonzero(live):
            member = atoms[atom].reshape(len(LAYERS), N_EXPERTS) >= 0.5
            key = f"patterns.{level}.{atom}"
            found[f"{key}.usage"] = usage[atom] / usage[live].sum()
            found[f"{key}.n_members"] = member.sum()
            found[f"{key}.n_layers"] = member.any(axis=1).sum()
    return found


def expected_sureness(run):
    """What it should say of draws, from the scores' files."""
    plan = json.loads((run / "plan.json").read_text())
    found = {"plan.sureness": plan["sureness"], "agreement.drop": 0.25}
    found["agreement.chance"] = 0.75 / 1.25
    for place, name in enumerate(SURE):
        file = run / "scores" / f"{name}.parquet"
        kept = pl.read_parquet(file)["kept_probability"].to_numpy()
        about = json.loads(pl.read_parquet_metadata(file)["moecollab"])["spread"]
        key = f"sure.{name[:-3]}" + (f".{place + 1}" if place else "")
        stay, go = (kept >= 0.95).sum(), (kept <= 0.05).sum()
        found |= {f"{key}.staying": stay, f"{key}.going": go, f"{key}.open": kept.size - stay - go}
        found |= {f"{key}.stability": about["stability"], f"{key}.n_sites": kept.size}
        found[f"{key}.resamples"] = about["settings"]["resamples"]
    return found


def expected_trials(run):
    """What it should say of written text, speed and size, from the evaluations' files."""
    found, shares = {}, {}
    for name in WROTE:
        file = json.loads((run / "evaluations" / f"{name}.json").read_text())
        texts, usage = file["generations"]["ids"], file["usage"]
        pairs = [list(pairwise(ids)) for ids in texts]
        fours = [[tuple(ids[i : i + 4]) for i in range(len(ids) - 3)] for ids in texts]
        shares[name] = np.mean([1 - len(set(grams)) / len(grams) for grams in fours])
        written, key = f"written.{name}", f"usage.{name}"
        found |= {
            f"{written}.n": len(texts),
            f"{written}.rep_4": shares[name],
            f"{written}.rep_2": np.mean([1 - len(set(grams)) / len(grams) for grams in pairs]),
            f"{written}.loop": np.mean([longest_loop(ids) / len(ids) for ids in texts]),
            f"{written}.stuck": np.mean([ends_in_loop(ids) for ids in texts]),
            f"{written}.distinct_2": len({p for grams in pairs for p in grams})
            / sum(map(len, texts)),
            f"{key}.prefill": np.median(usage["prefill"]),
            f"{key}.decode": np.median(usage["decode"]),
            f"{key}.parameters": usage["parameters"],
            f"{key}.weights": usage["weight_bytes"] / 1e6,
            f"{key}.disk": usage["disk_bytes"] / 1e6,
        }
        if usage["resident_bytes"] is not None:
            found[f"{key}.resident"] = usage["resident_bytes"] / 1e6
        if name != "full":
            found[f"{written}.difference"] = 100 * (shares[name] - shares["full"])
    return found


def test_every_number_equals_the_files_beside_the_page(run, html):
    page = Numbers(html)
    block = json.loads(page.block)
    use, overall = expected_use(run)
    expected = use | expected_drops(run, overall) | expected_costs(run) | expected_patterns(run)
    expected |= expected_sureness(run) | expected_trials(run)
    assert set(expected_trials(run)) <= set(block)
    assert set(expected_sureness(run)) - set(block) == {f"sure.gate_sum.2.{x}" for x in UNSHOWN}
    by_other_tests = re.compile(r".*\.(low|high|top_lift)|patterns\.\d\.\d+\.domain\..*")
    unknown = {key for key in block if key not in expected and not by_other_tests.fullmatch(key)}
    assert unknown == set()
    for key in set(block) & set(expected):
        assert block[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9), key
    assert len(set(block) & set(expected)) > 60
    for key, value, text in page.printed:
        assert block[key] == value, key
        assert text.strip(), key


def test_printed_text_is_the_number_rounded(html):
    for key, value, text in Numbers(html).printed:
        digits = re.sub(r"[^\d.\-]", "", text.replace("−", "-"))
        shown = float(digits) / (100 if "%" in text else 1)
        slack = 0.5 * 10.0 ** -len(digits.partition(".")[2]) / (100 if "%" in text else 1)
        if "<" not in text:
            assert abs(shown - value) <= slack * 1.01 + 1e-12, (key, value, text)


def figure_of(html, name):
    """Data and layout of a figure of the page."""
    start = html.index("Plotly.newPlot(", html.index(f'id="fig-{name}"'))
    text = html[html.index("[", start) :]
    data, end = json.JSONDecoder().raw_decode(text)
    layout, _ = json.JSONDecoder().raw_decode(text[text.index("{", end) :])
    return data, layout


def numbers_of(array):
    """An array as plotly writes it."""
    if not isinstance(array, dict):
        return np.array(array)
    flat = np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])
    return flat.reshape([int(size) for size in array.get("shape", f"{len(flat)}").split(",")])


def test_the_map_of_sureness_is_that_of_the_file(run, html):
    table = pl.read_parquet(run / "scores" / "caep-25.parquet")
    (trace,), layout = figure_of(html, "sureness")
    shown, cells = numbers_of(trace["z"]), numbers_of(trace["customdata"])
    assert (np.diff(shown, axis=1) <= 0).all()
    for row, layer in enumerate(LAYERS):
        of_layer = table.filter(pl.col("layer") == layer).sort("expert")
        ids = cells[row, :, 0].astype(int)
        assert sorted(ids) == list(range(N_EXPERTS))
        assert np.allclose(shown[row], 100 * of_layer["kept_probability"].to_numpy()[ids])
        assert np.allclose(cells[row, :, 1], of_layer["score"].to_numpy()[ids])
        assert np.allclose(cells[row, :, 2], of_layer["low"].to_numpy()[ids])
    kept = [len(ids) for ids in load_plan(run / "plan.json").keep.values()]
    corners = re.findall(r"([\d.]+),(-?[\d.]+)", layout["shapes"][0]["path"])
    assert [float(edge) for edge, _ in corners[::2]] == [count + 0.5 for count in kept]
    assert [float(row) for _, row in corners] == [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]


def test_the_map_of_agreement_is_that_of_the_scores(run, html):
    (trace,), _ = figure_of(html, "agreement")
    found = numbers_of(trace["z"])
    names = ["caep", "frequency", "gate_sum", "random"]
    wanted = agreement([run / "scores" / f"{name}-25.parquet" for name in names], drop=0.25)
    for row in wanted.iter_rows(named=True):
        at = tuple(names.index(row[one].removesuffix("-25")) for one in ("first", "second"))
        assert found[at] == found[at[::-1]] == pytest.approx(100 * row["jaccard"])


def test_the_commands_resample_again(html):
    """The plan knows how sure it is, so its scores were resampled."""
    command = "uncertainty run/activations --criterion caep --collaboration run/collaboration"
    drawn = r"--folds \d+ --resamples \d+ --confidence 0\.95 --seed \d+"
    assert re.search(
        rf"moecollab {command} --drop 0\.25 --per layer {drawn} --out run/scores\.parquet", html
    )


def test_the_commands_repeat_the_very_numbers(run):
    made = plan(load_scores(run / "scores" / "random-25.parquet"), drop=1 / 3)
    said = "".join(commands(gather(None, plan=made)))
    assert said.count(f"--drop {1 / 3} ") == 2


def test_scores_without_a_spread_or_company_have_no_such_figures(run, tmp_path):
    lone = run / "scores" / "random-25.parquet"
    text = report(tmp_path / "a.html", scores=lone, plan=run / "plan.json").read_text()
    assert "fig-sureness" not in text
    assert "fig-agreement" not in text
    text = report(tmp_path / "b.html", scores=run / "scores" / "caep-25.parquet").read_text()
    assert "fig-sureness" in text


def test_intervals_are_those_of_differences(run, html):
    block = json.loads(Numbers(html).block)
    found = {path.stem: load_evaluation(path) for path in (run / "evaluations").glob("*.json")}
    table = differences(found).filter(pl.col("domain") == "all", pl.col("model") != "full")
    for row in table.iter_rows(named=True):
        if row["metric"] == "rep_4":
            assert block[f"written.{row['model']}.low"] == 100 * row["difference_low"]
            assert block[f"written.{row['model']}.high"] == 100 * row["difference_high"]
        elif row["measure"] == "loss":
            assert block[f"cost.{row['model']}.low"] == row["difference_low"]
            assert block[f"cost.{row['model']}.high"] == row["difference_high"]
    pair = differences(
        {name: found[name] for name in ("caep-25", "random-25")}, baseline="random-25"
    )
    row = pair.filter(measure="loss", model="caep-25", domain="all")
    assert block["gap.caep-25.random-25.low"] == row["difference_low"].item()


def test_domain_shares_of_a_group_add_up(run, html):
    block = json.loads(Numbers(html).block)
    acts = pl.read_parquet(run / "activations" / "samples.parquet")
    tokens = dict(acts.group_by("domain").agg(pl.col("n_tokens").sum()).iter_rows())
    for level in (1, 2):
        atoms = {
            key.split(".")[2] for key in block if f"patterns.{level}." in key and ".dom" in key
        }
        assert atoms
        part = {name: count / sum(tokens.values()) for name, count in tokens.items()}
        for atom in atoms:
            key = f"patterns.{level}.{atom}"
            lift = {name: block.get(f"{key}.domain.{name}", 0.0) for name in DOMAINS}
            assert sum(lift[name] * part[name] for name in DOMAINS) == pytest.approx(1, abs=1e-6)
            assert block.get(f"{key}.top_lift", max(lift.values())) == max(lift.values())


def test_corpus_text_is_escaped_everywhere(html):
    assert "<script>alert" not in html
    assert "<b>law" not in html
    assert "&lt;b&gt;law" in html
    assert "models/<tiny>" not in html


def test_page_asks_nobody_for_anything(html):
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#)[^"'\s>]+""", own)
    assert "@import" not in own
    assert "url(" not in own
    assert "default-src 'none'" in own


def test_page_is_the_same_every_time(run, html, tmp_path):
    assert report(tmp_path / "again.html", run=run).read_text() == html


def test_objects_and_paths_give_the_same_page(run, html, tmp_path):
    page = report(
        tmp_path / "given.html",
        activations=run / "activations",
        collaboration=str(run / "collaboration"),
        scores=sorted((run / "scores").glob("*.parquet")),
        plan=load_plan(run / "plan.json"),
        evaluations={p.stem: load_evaluation(p) for p in sorted((run / "evaluations").iterdir())},
    )
    assert page.read_text() == html


def test_a_page_is_not_replaced_unasked(run, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"report\.html exists"):
        report(page, run=run)
    assert page.read_text() == "mine"
    report(page, evaluations=run / "evaluations", overwrite=True)
    assert "What it cost" in page.read_text()


def test_what_models_write_stands_side_by_side(html, run, tmp_path):
    assert html.count("Beginning 1 &lt;b&gt;of&lt;/b&gt;") == 1
    head = html[html.index("<h4>Side by side") :]
    assert re.findall(r"<th>(.*?)</th>", head[: head.index("</tr>")]) == [
        *("beginning", "full", "caep-25", "random-50")
    ]
    assert "Median of 3 rounds after a warm-up: 1 sequence of 48 drawn tokens" in html
    shutil.copytree(run / "evaluations", tmp_path / "evaluations")
    for file in (tmp_path / "evaluations").glob("*.json"):
        plain = json.loads(file.read_text()) | {"generations": None, "usage": None}
        file.write_text(json.dumps(plain))
    without = report(tmp_path / "page.html", run=tmp_path).read_text()
    assert "Side by side" not in without
    assert "Speed and size" not in without


def test_missing_parts_are_said(run, tmp_path):
    text = report(tmp_path / "a.html", activations=run / "activations").read_text()
    assert "Give activations and a collaboration" in text
    assert "Give a plan" in text
    assert "Give evaluations" in text
    text = report(tmp_path / "b.html", evaluations=run / "evaluations").read_text()
    assert "Give activations (the folder that" in text
    assert 'id="fig-cost"' in text
    text = report(tmp_path / "c.html", plan=run / "plan.json").read_text()
    assert 'id="fig-scores"' in text
    text = report(tmp_path / "d.html", collaboration=run / "collaboration").read_text()
    assert "Give activations and a collaboration" in text


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(MissingInputError, match="nothing to report; give"):
        report(tmp_path / "report.html")
    with pytest.raises(MissingInputError, match="nothing to report"):
        report(tmp_path / "report.html", run=tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        report(tmp_path / "report.html", run=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_recording_are_refused(run, tmp_path):
    plan = replace(load_plan(run / "plan.json"), activations="feedfeedfeedfeed")
    with pytest.raises(StaleInputError, match="the plan was made from activations feedfeed"):
        report(tmp_path / "report.html", activations=run / "activations", plan=plan)


def test_the_same_text_is_called_out(run, tmp_path):
    full = load_evaluation(run / "evaluations" / "full.json")
    about = dict(full.about) | {"inputs": {"corpus": "calibration-text"}}
    same = {
        "full": evaluation("full", full.documents, about),
        "caep-25": evaluation("caep-25", full.documents, about),
    }
    page = report(tmp_path / "r.html", activations=run / "activations", evaluations=same)
    assert "texts that the plan was made from, so the costs look smaller" in page.read_text()


def evaluation(name, documents, about):
    return Evaluation(name=name, model="m", documents=documents, about=about)


def losses(values, domain="a"):
    table = {
        "document": [str(i) for i in range(len(values))],
        "domain": [domain] * len(values),
        "tokens": [10] * len(values),
        "nll": [10.0 * value for value in values],
    }
    return pl.DataFrame(table)


def found_sentences(named, chosen="caep"):
    found = {name: evaluation(name, losses(values), {"seed": 0}) for name, values in named.items()}
    costs = costs_of(found)
    return [str(one) for one in cost_findings(costs, found, Ledger(), chosen)]


def test_findings_say_when_the_chosen_criterion_is_not_the_best():
    (said,) = found_sentences(
        {"full": [1, 2], "caep-25": [1.3, 2.3], "reap-25": [1.1, 2.1], "random-25": [1.5, 2.5]}
    )
    assert "experts that CAEP ranks lowest" in said
    assert "CAEP is not the best here: REAP costs" in said
    assert ">0.300</data></b> nats per token" in said


def test_findings_speak_of_the_best_when_nothing_was_chosen():
    named = {"full": [1, 2], "caep-25": [1.3, 2.3], "reap-25": [1.1, 2.1]}
    (said,) = found_sentences(named, chosen=None)
    assert "at best (REAP)" in said


def test_findings_say_when_the_chosen_criterion_is_the_best_and_when_it_may_be_chance():
    (said,) = found_sentences(
        {"full": [1, 2], "caep-50": [1.1, 2.1], "reap-50": [1.2, 2.2], "random-50": [1.0, 2.3]}
    )
    assert "No other criterion tried costs less." in said
    assert "CAEP − random" in said
    assert "CAEP − REAP" in said
    assert "may be chance" in said


def test_one_document_has_no_interval():
    (said,) = found_sentences({"full": [1], "caep-25": [1.3], "random-25": [1.5]})
    assert "so no interval" in said


def test_costs_without_a_full_model_are_not_shown():
    found = {name: evaluation(name, losses([1, 2]), {}) for name in ("caep-25", "reap-25")}
    assert costs_of(found) is None


def test_seeds_keep_their_names_and_the_middle_one_speaks():
    values = {"full": 1.0, "caep-25-seed0": 1.3, "caep-25-seed1": 1.1, "caep-25-seed2": 1.2}
    found = {name: evaluation(name, losses([x, x]), {}) for name, x in values.items()}
    costs = costs_of(found)
    assert [cost.short for cost in costs.overall] == [
        "CAEP · seed1",
        "CAEP · seed2",
        "CAEP · seed0",
    ]
    assert costs.of("caep", 0.25).name == "caep-25-seed2"


def test_use_by_hand():
    """Two domains that share no expert diverge fully; those that route alike do not at all."""
    inside = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    use = ExpertUse(
        layers=(3, 7),
        domains=("a", "b"),
        overall=inside.mean(axis=0),
        by_domain=inside,
        counts=np.array([[50, 50], [50, 3]]),
    )
    assert use.divergence == pytest.approx([1.0, 0.0])
    assert use.leaning.tolist() == [[0, 1], [0, -1]]
    assert use.lift[0].tolist() == [[2.0, 0.0], [1.0, 0.0]]


def test_sites_that_are_no_experts_are_neither_drawn_nor_counted():
    shares = np.array([[0.4, 0.3, 0.3], [0.9, 0.1, 0.0]])
    use = ExpertUse(
        layers=(3, 7),
        domains=("a", "b"),
        overall=shares,
        by_domain=np.stack([shares, shares]),
        counts=np.array([[50, 50, 50], [50, 50, 0]]),
        present=np.array([[True, True, True], [True, True, False]]),
    )
    assert use.busiest(0.4) == pytest.approx((0.9 + 0.4) / 2)  # two of five, not of six
    for trace in use_map(use, {}, ("a", "b")).data:
        assert np.isnan(trace.z[1, 2])
        assert np.isfinite(trace.z).sum() == 5
    made = Plan(
        keep={3: (0, 1), 7: (1,)},
        n_experts=3,
        top_k=1,
        criterion="reap",
        drop=0.4,
        per="layer",
        scores=np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 0.0]]),
        experts_per_layer=(3, 2),
    )
    kept, dropped = score_strip(drops_of(made, (), use, {})).data
    assert list(zip(kept.y, kept.x, strict=True)) == [("3", 3.0), ("3", 2.0), ("7", 2.0)]
    assert list(zip(dropped.y, dropped.x, strict=True)) == [("3", 1.0), ("7", 1.0)]


def test_the_objective_is_the_sum_of_its_terms_in_every_round(run):
    history = json.loads((run / "collaboration" / "history.json").read_text())["history"]
    settings = json.loads((run / "collaboration" / "manifest.json").read_text())["settings"]
    found = fit_history(history, settings)
    total, *terms = (curve.values for curve in found.curves)
    assert len(found.stages) > 1
    assert found.stages[0][0] == found.rounds[0] == 1
    for at, whole in enumerate(total):
        if found.rounds[at] is None:
            assert whole is None
        else:
            assert whole == pytest.approx(sum(term[at] for term in terms), rel=1e-6)


def test_best_window_stays_in_its_sample():
    strength = np.zeros(120)
    strength[55:65] = 1.0
    sample = np.repeat(np.array([0, 1], dtype=np.uint32), 60)
    strength[59] = 0.5
    window = best_window(strength, sample)
    assert window.start >= 60 or window.stop <= 60
    assert strength[window].sum() == 5.0


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (numbers.percent, 0.25, "25\u202f%"),
        (numbers.percent, 0.1234, "12.3\u202f%"),
        (numbers.percent, 0.00004, "<\u202f0.01\u202f%"),
        (numbers.percent, 0.0, "0\u202f%"),
        (numbers.signed, 0.1234, "+0.123"),
        (numbers.signed, -0.1234, "−0.123"),
        (numbers.signed, -0.00004, "0.000"),
        (numbers.whole, 1234567, "1,234,567"),
        (numbers.ratio, 2.44, "2.4×"),
        (numbers.ratio, 24.4, "24×"),
        (numbers.four_digits, 0.000123456, "0.0001235"),
    ],
)
def test_numbers_as_people_write_them(write, value, text):
    assert write(value) == text


def test_one_name_cannot_stand_for_two_numbers():
    ledger = Ledger()
    ledger.count("a", 1)
    ledger.count("a", 1)
    with pytest.raises(ValueError, match="give each number one name"):
        ledger.count("a", 2)


def test_activations_alone_need_no_patterns(tmp_path):
    acts = write_activations(tmp_path / "acts")
    page = report(tmp_path / "r.html", activations=acts, title="A & <b>")
    assert "<title>A &amp; &lt;b&gt;</title>" in page.read_text()
