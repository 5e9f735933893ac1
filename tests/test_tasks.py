"""lm-eval on five questions: results, directions, errors."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from moecollab.errors import DataError, MissingInputError, SettingsError
from moecollab.evaluation import answering
from moecollab.evaluation import tasks as door
from moecollab.evaluation.differences import differences
from moecollab.evaluation.evaluation import evaluate, load_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny():
    return models.build("qwen2_moe")


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder, cache, name="five", text="{{question}}", data="five.jsonl"):
    """A task of five questions in lm-eval's format."""
    rows = [
        {"question": f"{i} + 1 =", "choices": [str(i + 1), str(i), "x"], "answer": i % 3}
        for i in range(5)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "five.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(
        YAML.format(name=name, data=folder / data, cache=cache, text=text)
    )


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tasks")
    write_task(base / "yaml", base / "cache")
    return base / "yaml"


@pytest.fixture(scope="module")
def answered(folder, task_folder):
    return evaluate(folder, tasks=["five"], task_folder=task_folder, limit=4, batch_size=2)


def test_tasks_keep_direction_and_counts(answered):
    assert [result.metric for result in answered.tasks] == ["acc", "acc_norm"]
    for result in answered.tasks:
        assert (result.task, result.filter, result.higher_is_better) == ("five", "none", True)
        assert (result.n, result.n_original) == (4, 5)
        assert result.value == np.mean(result.values)
        assert len(result.values) == 4
        assert result.questions
    assert answered.task_table.height == 2
    assert answered.documents is None
    assert "five acc" in repr(answered)


def test_tasks_agree_with_direct_scoring(tiny, tokenizer, answered):
    """Accuracy from sums of log-probabilities of each choice after its question."""
    right = []
    for i in range(4):
        sums = []
        for choice in (str(i + 1), str(i), "x"):
            context = tokenizer(f"{i} + 1 =")["input_ids"]
            ids = context + tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = tiny(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[p - 1, ids[p]]) for p in range(len(context), len(ids))))
        right.append(float(np.argmax(sums) == i % 3))
    assert next(r for r in answered.tasks if r.metric == "acc").values == tuple(right)


def test_tasks_survive_a_file(answered, tmp_path):
    answered.save(tmp_path / "e.json")
    assert load_evaluation(tmp_path / "e.json").tasks == answered.tasks


def test_tasks_leave_tokenizer_and_seeds_alone(tiny, task_folder):
    tokenizer = models.build_tokenizer()
    tokenizer.pad_token = None
    questions = door.load_tasks(["five"], task_folder, limit=2)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    door.Exam(tiny, tokenizer, questions, batch_size=2).results()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert tokenizer.pad_token is None


def test_data_that_cannot_be_had(tmp_path):
    write_task(tmp_path / "t", tmp_path / "c", data="none.jsonl")
    with pytest.raises(MissingInputError, match="the data of five cannot be had") as caught:
        door.load_tasks(["five"], tmp_path / "t")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_broken_task_is_a_data_error(tmp_path):
    write_task(tmp_path / "t", tmp_path / "c", text="{{question[0][1]}}")
    with pytest.raises(DataError, match=r"lm-eval failed on five: .* look at the task's YAML"):
        door.load_tasks(["five"], tmp_path / "t")


def test_a_failing_model_is_a_data_error(tokenizer, task_folder, monkeypatch):
    model = models.build("qwen2_moe").train()

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(model, "forward", fail)
    questions = door.load_tasks(["five"], task_folder, limit=2)
    with pytest.raises(DataError, match="lm-eval failed on five: RuntimeError: out of memory; "):
        door.Exam(model, tokenizer, questions, batch_size=2).results()
    assert model.training


def test_task_folder_must_be_there(tmp_path):
    with pytest.raises(DataError, match="is not a folder; give one with YAML tasks"):
        door.load_tasks(["five"], tmp_path / "none")


def test_unknown_tasks_suggest_near_ones(task_folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=str(task_folder), include_defaults=False)
    monkeypatch.setattr(door, "_manager", lambda *_: local)
    with pytest.raises(SettingsError, match=r"task is 'fife'.*did you mean five\?"):
        door.load_tasks(["fife"], task_folder)


def test_tasks_of_lm_eval_are_looked_up_only_when_needed(task_folder, monkeypatch):
    import lm_eval.tasks

    asked = []

    class Index:
        def __init__(self, include_path=None, include_defaults=True):
            asked.append((include_path, include_defaults))
            self.task_index = {"five", "arc_easy"} if include_defaults else {"five"}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Index)
    folder = str(task_folder)
    assert "five" in door._manager(["five"], task_folder).task_index
    assert asked == [(folder, False)]
    assert "arc_easy" in door._manager(["five", "arc_easy"], task_folder).task_index
    assert asked[1:] == [(folder, False), (folder, True)]


def test_answers_are_those_of_lm_evals_own_adapter(tokenizer):
    """Contexts that are shared, empty, or too long, choices of one token and of several."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = models.build("qwen2_moe")
    long = "the owl hunts at night and the fox jumps over the lazy dog " * 30
    pairs = [("1 + 1 =", " 2"), ("1 + 1 =", " 3"), ("1 + 1 =", " the court"), ("", "owl")]
    pairs += [(long, " fox"), (f"{long} and", " the court held"), ("Owls", " hunt at night.")]
    asked = [
        Instance("loglikelihood", {}, pair, 0, metadata=("t", at, 1))
        for at, pair in enumerate(pairs)
    ]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(asked, True)
    for batch_size in (1, 3):
        ours = answering.Respondent(model, tokenizer, batch_size).loglikelihood(asked)
        assert [right for _, right in ours] == [right for _, right in plain]
        np.testing.assert_allclose([p for p, _ in ours], [p for p, _ in plain], rtol=1e-5)


def test_batches_hold_every_row_once_in_order():
    rows = [(7,) * n for n in (900, 300, 128, 128, 100, 9, 9, 9, 9, 1)]
    found = list(answering.batches(rows, 1))
    assert [row for batch in found for row in batch] == rows
    assert [len(batch) for batch in found] == [1, 1, 2, 2, 4]
    assert all(len(batch) * len(batch[0]) <= max(256, len(batch[0])) for batch in found)


def test_a_folder_is_kept_only_if_a_task_lies_in_it(task_folder):
    """The command that repeats a comparison names it then."""
    places = {"five": task_folder / "five.yaml", "arc_easy": Path("lm_eval/arc_easy.yaml")}
    index = {name: SimpleNamespace(yaml_path=path) for name, path in places.items()}
    manager = SimpleNamespace(task_index=index | {"made": SimpleNamespace(yaml_path=None)})
    assert door._folder(manager, ["five", "arc_easy"], task_folder) == str(task_folder)
    assert door._folder(manager, ["arc_easy"], task_folder) is None
    assert door._folder(manager, ["five"], None) is None
    assert door._folder(manager, ["made"], task_folder) == str(task_folder)  # nobody knows


def test_nothing_of_lm_eval_is_shown(folder, task_folder, capfd, caplog):
    """Its bars and its warnings come with every cut; neither tqdm nor its logger stays changed."""
    import logging

    from tqdm.std import tqdm

    before = tqdm.__init__, logging.getLogger("lm_eval").level
    evaluate(folder, tasks="five", task_folder=task_folder, limit=2)
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == before
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    tqdm(range(2))
    assert "0/2" in capfd.readouterr().err


def test_other_words_are_not_paired(folder, tmp_path):
    """The same documents under another template are other questions."""
    found = []
    for name, text in (("a", "{{question}}"), ("b", "Q: {{question}}")):
        write_task(tmp_path / name, tmp_path / f"{name}_cache", text=text)
        found.append(evaluate(folder, tasks=["five"], task_folder=tmp_path / name, name=name))
    first, second = (one.tasks[0] for one in found)
    assert first.questions == second.questions
    assert first.prompts != second.prompts
    table = differences({"a": found[0], "b": found[1]}, baseline="a").filter(model="b")
    assert table["difference"].null_count() == table.height
    older = replace(found[1], tasks=tuple(replace(one, prompts="") for one in found[1].tasks))
    table = differences({"a": found[0], "b": older}, baseline="a").filter(model="b")
    assert table["difference"].null_count() == 0
