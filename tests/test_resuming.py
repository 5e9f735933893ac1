"""Tasks: lm-eval's own command says the same; stopped runs go on; logs hold what was asked."""

import json
import math
import subprocess
import sys

import polars as pl
import pytest

import models
from moecollab.demo.demo import MODEL
from moecollab.errors import OutputExistsError
from moecollab.evaluation import answering
from moecollab.evaluation.evaluation import evaluate
from moecollab.evaluation.stages import Stages
from test_tasks import write_task

WRITING = """
task: writing
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  max_gen_toks: 6
  do_sample: false
  until: ["x"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Choices, written answers, and a group of both."""
    base = tmp_path_factory.mktemp("tasks")
    folder = base / "yaml"
    write_task(folder, base / "cache")
    write_task(folder, base / "cache", name="six", text="Say {{question}}")
    places = {"data": folder / "five.jsonl", "cache": base / "cache"}
    (folder / "writing.yaml").write_text(WRITING.format(**places))
    group = {"group": "both", "task": ["five", "six"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(json.dumps(group))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
def test_numbers_are_those_of_lm_evals_own_command(task_folder, tmp_path):
    """On the embedded model, in a process that knows nothing of moecollab."""
    tasks, limit = ["five", "six", "writing"], 4
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={MODEL},dtype=float32", "--device", "cpu"]
    command += ["--tasks", *tasks, "--include_path", str(task_folder), "--limit", str(limit)]
    command += ["--output_path", str(tmp_path / "theirs"), "--batch_size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    file = next((tmp_path / "theirs").rglob("results*.json"))
    theirs = json.loads(file.read_text())["results"]
    asked = {"tasks": tasks, "task_folder": task_folder, "limit": limit, "dtype": "float32"}
    ours = evaluate(MODEL, **asked, batch_size=3)
    found = {(row.task, f"{row.metric},{row.filter}"): row for row in ours.tasks}
    expected = {
        (task, key): value
        for task, metrics in theirs.items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }
    assert set(found) == set(expected)
    assert len(expected) >= 5
    for (task, key), value in expected.items():
        assert found[task, key].value == pytest.approx(value, rel=1e-9), (task, key)
        spread = theirs[task].get(key.replace(",", "_stderr,"))
        if isinstance(spread, float) and math.isfinite(spread):
            assert found[task, key].stderr == pytest.approx(spread, rel=1e-9)


def test_a_killed_run_goes_on_by_task(folder, task_folder, tmp_path, monkeypatch):
    """Stopped in the second task of a group, it asks the first nothing again."""
    asked = {"tasks": ["both", "writing"], "task_folder": task_folder, "corpus": ["a text", "two"]}
    asked |= {"generate": 4, "samples": tmp_path / "log.jsonl"}
    whole = evaluate(folder, **asked | {"samples": None})
    plain, seen = answering.HFLM.loglikelihood, []

    def stopping(self, requests, disable_tqdm=False):
        seen.append(requests[0].task_name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(self, requests, disable_tqdm)

    monkeypatch.setattr(answering.HFLM, "loglikelihood", stopping)
    out = tmp_path / "run" / "e.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, **asked, out=out)
    assert not out.exists()
    found = evaluate(folder, **asked, out=out)
    assert seen == ["five", "six", "six"]
    assert found.tasks == whole.tasks
    assert {row.task for row in found.tasks} == {"both", "five", "six", "writing"}
    assert found.documents.equals(whole.documents)
    assert found.generations.equals(whole.generations)
    assert [path.name for path in out.parent.iterdir()] == ["e.json"]
    assert pl.read_ndjson(tmp_path / "log.jsonl")["task"].unique().len() == 3


def test_parts_of_another_run_are_made_again(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return [made[-1], -math.inf]

    out = tmp_path / "e.json"
    first, same, other = (Stages(out, {"seed": seed}) for seed in (0, 0, 1))
    assert first.part("a/b c", make) == same.part("a/b c", make) == [0, -math.inf]
    assert other.part("a/b c", make)[0] == 1
    assert first.part("a/b c", make)[0] == 2
    damaged = next((tmp_path / ".e.json.partial").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert first.part("a/b c", make)[0] == 3
    first.clear()
    assert list(tmp_path.iterdir()) == []
    assert Stages(None, {}).part("x", make)[0] == 4


def test_logs_hold_questions_and_answers(folder, task_folder, tmp_path):
    asked = {"tasks": ["five", "writing"], "task_folder": task_folder, "limit": 2}
    for name, read in (("log.jsonl", pl.read_ndjson), ("log.parquet", pl.read_parquet)):
        found = evaluate(folder, **asked, samples=tmp_path / name)
        log = read(tmp_path / name)
        five = log.filter(task="five")
        assert five["document"].to_list() == [0, 1]
        assert [[pair[1] for pair in json.loads(text)] for text in five["asked"]] == [
            [" 1", " 0", " x"],
            [" 2", " 1", " x"],
        ]
        scores = [json.loads(text)["acc"] for text in five["scores"]]
        acc = next(row for row in found.tasks if (row.task, row.metric) == ("five", "acc"))
        assert tuple(scores) == acc.values
        assert log.filter(task="writing").height == 2
        with pytest.raises(OutputExistsError, match="exists"):
            evaluate("no/such/model", **asked, samples=tmp_path / name)


def test_models_and_tokenizers_without_ends_or_padding_answer(task_folder):
    """The embeddings have no row for a token that would be added for padding."""
    model, tokenizer = models.build("qwen2_moe"), models.build_tokenizer()
    asked = {"tasks": ["five", "writing"], "task_folder": task_folder, "limit": 3}
    whole = evaluate(model, tokenizer=tokenizer, **asked)
    for name in ("pad_token", "eos_token", "bos_token", "unk_token"):
        setattr(tokenizer, name, None)
    bare = evaluate(model, tokenizer=tokenizer, **asked)
    assert bare.tasks == whole.tasks
    assert tokenizer.pad_token is None
    assert tokenizer.eos_token is None
