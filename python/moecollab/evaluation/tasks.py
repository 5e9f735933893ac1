"""The door to lm-eval: task names in, plain results out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moecollab.errors import DataError, MissingInputError, MoeCollabError, SettingsError
from moecollab.manifest import digest_json

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
        Digest of the questions asked; results with the same one can be paired.
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

    def as_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self) | {"values": list(self.values)}


def load_tasks(
    tasks: Sequence[str], task_folder: str | PathLike[str] | None = None, *, seed: int = 0
) -> Any:  # noqa: ANN401 (lm-eval's own dictionary of tasks and groups)
    """The tasks with their data, ready for :func:`run_tasks`.

    Parameters
    ----------
    tasks : sequence of str
        Names of tasks or groups in `task_folder` or, if one is not there, of lm-eval.
    task_folder : path, optional
        Folder of YAML tasks.
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
    manager = _manager(tasks, task_folder)
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SettingsError("task", unknown[0], f"a task of lm-eval or of task_folder{hint}")
    try:
        loaded = manager.load(list(tasks))
    except OSError as cause:
        raise MissingInputError(
            f"the data of {', '.join(tasks)} cannot be had ({_first_line(cause)}); connect once to "
            "download it, or give tasks with local files in task_folder"
        ) from cause
    except Exception as cause:
        raise _failure(tasks, cause) from cause
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def run_tasks(
    model: Any,  # noqa: ANN401 (any causal language model)
    tokenizer: Any,  # noqa: ANN401 (any tokenizer)
    loaded: Any,  # noqa: ANN401 (lm-eval's own dictionary of tasks and groups)
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> tuple[TaskResult, ...]:
    """Every metric of the loaded tasks, sorted by task, metric and filter.

    Raises
    ------
    DataError
        When lm-eval fails.
    """
    found = _run(model, tokenizer, loaded, limit=limit, batch_size=batch_size, seed=seed)
    return tuple(sorted(_results(found), key=lambda row: (row.task, row.metric, row.filter)))


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


def _run(
    model: Any,  # noqa: ANN401 (any causal language model)
    tokenizer: Any,  # noqa: ANN401 (any tokenizer)
    loaded: Any,  # noqa: ANN401 (lm-eval's own dictionary of tasks and groups)
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> Mapping[str, Any]:
    """lm-eval's results; neither the tokenizer nor any global seed is changed."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            wrapped = HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
            found = evaluate(
                wrapped, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True
            )
    except MoeCollabError:
        raise
    except Exception as cause:
        raise _failure(sorted(loaded["tasks"]), cause) from cause
    finally:
        model.train(training)
    if found is None:
        raise DataError("lm-eval gives results on the first process only; run evaluate there")
    return dict(found)


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
