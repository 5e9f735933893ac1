"""The demo end to end: its files, its determinism and the truth of its report's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import moecollab as mc
from moecollab.demo import MODEL, read_questions
from moecollab.demo import demo as demonstration
from moecollab.demo.demo import CRITERIA, DROPS
from moecollab.demo.text import DOMAINS
from moecollab.manifest import digest_file, write_json

LOSS_OF_TEN = 3.913  # nats per token on the first ten held-out questions, when it was trained
REPRODUCIBLE = ("activations", "collaboration", "scores", "plans", "plan.json")


def run_demo(out: Path, threads: int) -> Path:
    command = [sys.executable, "-m", "moecollab", "demo", "--out", out, "--threads", str(threads)]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return out


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "two", threads=2)


def files(folder: Path) -> dict[str, str]:
    found = {}
    for name in REPRODUCIBLE:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(folder))] = digest_file(file)
    return found


@pytest.mark.slow
def test_every_intermediate_file_is_left(demo):
    for name in (*REPRODUCIBLE, "calibration.jsonl", "held_out.jsonl", "pruned", "report.html"):
        assert (demo / name).exists(), name
    plans = {f"{c}-{round(100 * d)}" for c in CRITERIA for d in DROPS}
    assert {p.stem for p in (demo / "plans").iterdir()} == plans
    assert {p.stem for p in (demo / "evaluations").iterdir()} == plans | {"full"}


@pytest.mark.slow
def test_thread_count_does_not_change_a_byte(demo, tmp_path):
    assert files(run_demo(tmp_path / "one", threads=1)) == files(demo)


@pytest.mark.slow
def test_pruned_checkpoint_costs_what_its_mask_cost(demo):
    masked = mc.load_evaluation(demo / "evaluations" / "coverage-25.json")
    again = mc.evaluate(demo / "pruned", corpus=demo / "held_out.jsonl", dtype="float32")
    assert again.loss == pytest.approx(masked.loss, abs=1e-5)
    config = json.loads((demo / "pruned" / "config.json").read_text())
    assert config["num_experts"] == 18


@pytest.mark.slow
def test_dropping_hurts_and_random_hurts_most(demo):
    loss = {p.stem: mc.load_evaluation(p).loss for p in (demo / "evaluations").iterdir()}
    for name, value in loss.items():
        assert name == "full" or value > loss["full"]
    for drop in (25, 50):
        others = [loss[f"{criterion}-{drop}"] for criterion in CRITERIA if criterion != "random"]
        assert loss[f"random-{drop}"] > max(others)


def test_criteria_of_an_earlier_demo_leave_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "_steps", lambda *_: iter(()))
    write_json(tmp_path / demonstration.MARK, {"seed": 0})
    for name in ("scores", "plans", "evaluations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old-25.json").touch()
    demonstration.run_demo(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {demonstration.MARK}


def test_questions_cover_every_subject_once():
    subjects = [subject for group in DOMAINS.values() for subject in group]
    assert len(subjects) == len(set(subjects)) == 57
    calibration, held_out = read_questions()
    assert len({d["domain"] for d in calibration}) >= 5
    assert not {d["text"] for d in calibration} & {d["text"] for d in held_out}
    assert {d["domain"] for d in held_out} == set(DOMAINS)


def test_the_card_shows_that_the_model_is_worth_looking_at():
    card = json.loads((MODEL / "card.json").read_text())
    assert card["tokens_seen"] >= 15_000_000
    assert np.mean(card["loss_random_half_dropped"]) - card["loss"] >= 0.15
    domains = pl.DataFrame(card["domains"])
    assert (domains["loss"] < domains["entropy"] - 1).all()
    assert all(row["mean"] > 0.03 for row in card["divergence"])
    assert (MODEL / "model.safetensors").stat().st_size <= 10_000_000
    assert any(row["hit10"] > 0.5 for row in card["facts"])


def test_the_shipped_weights_are_the_trained_ones():
    """Losing a random half of the experts costs a nat here, another model would show as well."""
    _, held_out = read_questions()
    assert mc.evaluate(MODEL, corpus=held_out[:10], dtype="float32").loss == pytest.approx(
        LOSS_OF_TEN, abs=0.01
    )
