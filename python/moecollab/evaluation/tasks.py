"""The door to lm-eval: task names in, plain results out."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moecollab.errors import DataError, MissingInputError, MoeCollabError, SettingsError
from moecollab.manifest import digest_bytes, digest_json
from moecollab.progress import track

BOOTSTRAP = 1_000
"""Resamples behind the standard error of a metric that is no mean."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one lm-eval task or group.

    Parameters
    ----------
    task, metric, filter : str
        As lm-eval names them.
    value : float, optional
        The metric; None where it is not finite.
    stderr : float, optional
        Its standard error, if lm-eval gives one.
    higher_is_better : bool, optional
        Direction of the metric, if lm-eval knows it.
    n : int
        Questions that were asked.
    n_original : int
        Questions that the task has.
    values : tuple of float
        The metric on each question where its mean is the value, or else empty.
    questions : str
        Digest of the documents asked about, where there are `values`.
    prompts : str
        Digest of what the model was given to read and of the right answers; empty in files of
        before it was kept.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    n: int
    n_original: int
    values: tuple[float, ...] = ()
    questions: str = ""
    prompts: str = ""

    def asked_as(self, other: TaskResult) -> bool:
        """Whether both were asked the same in the same words, so that they can be paired."""
        known = {result.prompts for result in (self, other) if result.prompts}
        return self.questions == other.questions and len(known) < 2

    def as_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self) | {"values": list(self.values)}


@dataclass(frozen=True)
class Questions:
    """Tasks whose requests are built, so that every model is asked the very same.

    Parameters
    ----------
    loaded : object
        lm-eval's own dictionary of tasks and groups.
    built : mapping of task name to requests
        What each task asks, few-shot examples and all.
    limit : int or None
        Questions of each task.
    folder : str or None
        The `task_folder`, if not all tasks are lm-eval's own.
    """

    loaded: Any
    built: Mapping[str, Sequence[Any]]
    limit: int | None
    folder: str | None = None

    @property
    def digest(self) -> str:
        """Digest of everything asked, and of how it is judged."""
        tasks = self.loaded["tasks"]
        asked = {
            name: _prompts(_asked(tasks[name], request) for request in built)
            for name, built in self.built.items()
        }
        metrics = {name: sorted(map(str, task.aggregation())) for name, task in tasks.items()}
        return digest_json({"asked": asked, "metrics": metrics})

    def renew(self) -> None:
        """Takes back all answers."""
        for name, task in self.loaded["tasks"].items():
            fresh = [replace(one, resps=[], filtered_resps={}) for one in self.built[name]]
            task._instances = fresh
            # lm-eval would build them again for every model, and draw other examples each time.
            task.build_all_requests = _do_nothing


def load_tasks(
    tasks: Sequence[str],
    task_folder: str | PathLike[str] | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Questions:
    """The questions of some tasks, ready for an :class:`Exam`.

    Parameters
    ----------
    tasks : sequence of str
        Names of tasks or groups in `task_folder` or, if one is not there, of lm-eval.
    task_folder : path, optional
        Folder of YAML tasks.
    limit : int, optional
        Questions of each task; all if not given.
    seed : int
        Seed of the choice of few-shot examples.

    Raises
    ------
    SettingsError
        When a task is not known.
    MissingInputError
        When the data of a task cannot be had, for lack of a network say.
    DataError
        When lm-eval fails on a task for another reason.
    """
    from moecollab.evaluation.answering import hushed

    with hushed(), track("reading tasks", len(tasks)):
        manager = _manager(tasks, task_folder)
        loaded = _load(manager, tasks)
        built = {}
        try:
            for name, task in loaded["tasks"].items():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(seed=seed)
                task.build_all_requests(limit=limit)
                built[name] = tuple(task.instances)
        except Exception as cause:
            raise _failure(tasks, cause) from cause
    return Questions(loaded, built, limit, _folder(manager, tasks, task_folder))


def _folder(
    manager: Any,  # noqa: ANN401 (lm-eval's own)
    tasks: Sequence[str],
    task_folder: str | PathLike[str] | None,
) -> str | None:
    """The folder of tasks, unless all that are asked for lie elsewhere, among lm-eval's own."""
    if task_folder is None:
        return None
    files = [manager.task_index[name].yaml_path for name in tasks]
    inside = Path(task_folder).resolve()
    apart = all(file is not None and inside not in Path(file).resolve().parents for file in files)
    return None if apart else str(task_folder)


def _load(manager: Any, tasks: Sequence[str]) -> Any:  # noqa: ANN401 (lm-eval's own)
    """lm-eval's own dictionary of tasks and groups, with their data."""
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SettingsError("task", unknown[0], f"a task of lm-eval or of task_folder{hint}")
    try:
        return manager.load(list(tasks))
    except OSError as cause:
        raise MissingInputError(
            f"the data of {', '.join(tasks)} cannot be had ({_first_line(cause)}); connect once to "
            "download it, or give tasks with local files in task_folder"
        ) from cause
    except Exception as cause:
        raise _failure(tasks, cause) from cause


def _do_nothing(**_: object) -> None:
    """Stands for building requests that are there already."""


class Exam:
    """One model and what it is asked; the model may be masked in another way each time.

    Parameters
    ----------
    model, tokenizer : causal language model and its tokenizer
        Loaded; neither they nor any global seed are changed.
    questions : Questions
        What :func:`load_tasks` gave.
    batch_size : int
        Rows per forward pass, at least 1; more if they are short.
    seed : int
        Seed of what the model draws, where a task lets it.
    keep : callable, optional
        Takes the name of a task and what makes its answers, and gives them as they were kept.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 (any causal language model)
        tokenizer: Any,  # noqa: ANN401 (any tokenizer)
        questions: Questions,
        *,
        batch_size: int,
        seed: int = 0,
        keep: Callable[[str, Callable[[], Any]], Any] | None = None,
    ) -> None:
        from moecollab.evaluation.answering import Respondent, fitted

        self.model, self.questions, self.seed = model, questions, seed
        with _as_it_was(model):
            own = fitted(copy.deepcopy(tokenizer), model)
            self._respondent = Respondent(model, own, batch_size, keep)

    def results(self) -> tuple[TaskResult, ...]:
        """Every metric of the tasks as the model stands, sorted by task, metric and filter.

        Raises
        ------
        DataError
            When lm-eval fails.
        """
        return self.logged()[0]

    def logged(self) -> tuple[tuple[TaskResult, ...], Mapping[str, Any]]:
        """The results, and what was asked and answered, by task, as lm-eval logs it."""
        found = self._run()
        results = sorted(_results(found), key=lambda row: (row.task, row.metric, row.filter))
        return tuple(results), found.get("samples", {})

    def _run(self) -> Mapping[str, Any]:
        """lm-eval's results."""
        import torch
        from lm_eval.evaluator import evaluate

        from moecollab.evaluation.answering import hushed

        devices = [self.model.device] if self.model.device.type == "cuda" else []
        questions = self.questions
        questions.renew()
        try:
            with hushed(), _as_it_was(self.model), torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                self.model.eval()
                found = evaluate(
                    self._respondent,
                    questions.loaded,
                    limit=questions.limit,
                    bootstrap_iters=BOOTSTRAP,
                    log_samples=True,
                )
        except MoeCollabError:
            raise
        except Exception as cause:
            raise _failure(sorted(questions.built), cause) from cause
        if found is None:
            raise DataError("lm-eval gives results on the first process only; run evaluate there")
        return dict(found)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:  # noqa: ANN401 (any causal language model)
    """Puts the model back into its own mode at the end."""
    training = model.training
    try:
        yield
    finally:
        model.train(training)


def _manager(tasks: Sequence[str], task_folder: str | PathLike[str] | None) -> Any:  # noqa: ANN401
    """An index of the folder's tasks, and of lm-eval's own if one is missing there."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None and not Path(task_folder).is_dir():
        raise DataError(f"task_folder {task_folder} is not a folder; give one with YAML tasks")
    include = None if task_folder is None else str(task_folder)
    try:
        # Reading lm-eval's own fourteen thousand task files takes many seconds.
        manager = TaskManager(include_path=include, include_defaults=False)
        if all(name in manager.task_index for name in tasks):
            return manager
        return TaskManager(include_path=include)
    except Exception as cause:
        raise _failure(tasks, cause) from cause


def _results(found: Mapping[str, Any]) -> Iterator[TaskResult]:
    """One result per task, metric and filter."""
    for task, metrics in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        asked = int(metrics.get("sample_len", len(samples)))
        counts = found["n-samples"].get(task, {"original": asked, "effective": asked})
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            values, questions = _per_question(samples, metric, chosen, value)
            own = [row for row in samples if row["filter"] == chosen]
            yield TaskResult(
                task=task,
                metric=metric,
                filter=chosen,
                value=_finite(value),
                stderr=_finite(metrics.get(f"{metric}_stderr,{chosen}")),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                n=int(counts["effective"]),
                n_original=int(counts["original"]),
                values=values,
                questions=questions,
                prompts=_prompts((row["doc_id"], row["arguments"], row["target"]) for row in own),
            )


def _per_question(
    samples: Sequence[Mapping[str, Any]], metric: str, chosen: str, value: object
) -> tuple[tuple[float, ...], str]:
    """The metric on each question and the questions' digest, if the metric is a plain mean."""
    rows = [row for row in samples if row["filter"] == chosen and metric in row]
    rows.sort(key=lambda row: row["doc_id"])
    values = [_finite(row[metric]) for row in rows]
    known = tuple(number for number in values if number is not None)
    mean = _finite(value)
    if mean is None or len(known) < len(rows) or not known:
        return (), ""
    if not math.isclose(float(np.mean(known)), mean, rel_tol=1e-9, abs_tol=1e-12):
        return (), ""
    return known, digest_json([[row["doc_id"], row["doc_hash"]] for row in rows])


def _asked(task: Any, request: Any) -> tuple[object, ...]:  # noqa: ANN401 (lm-eval's own)
    """What one request says, and the right answer."""
    return request.doc_id, request.idx, request.args, task.doc_to_target(request.doc)


def _prompts(asked: Iterable[object]) -> str:
    """Digest of what was asked."""
    return digest_bytes(json.dumps(list(asked), default=str, sort_keys=True).encode())


def _finite(value: object) -> float | None:
    """The value as a float if it is a finite number."""
    if isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value):
        return float(value)
    return None


def _failure(tasks: Sequence[str], cause: Exception) -> DataError:
    return DataError(
        f"lm-eval failed on {', '.join(tasks)}: {type(cause).__name__}: {_first_line(cause)}; "
        "look at the task's YAML file and its data"
    )


def _first_line(cause: Exception) -> str:
    return next(iter(str(cause).splitlines()), type(cause).__name__)
