"""Commands as a user meets them: one clear sentence and exit code 1 for what goes wrong."""

import subprocess
import sys

import pytest


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
    for verb in ("extract", "fit", "score", "plan", "mask", "prune", "evaluate", "report", "demo"):
        assert verb in found.stdout


def test_usage_error_is_exit_code_two():
    assert run("plan").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "nowhere", "--out", "c"], "nowhere"),
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
