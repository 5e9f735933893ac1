"""Evaluations: held-out loss by document and lm-eval tasks of one model, and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from moecollab.errors import DataError, MissingInputError, SettingsError
from moecollab.evaluation.intervals import Interval, ratio_interval
from moecollab.evaluation.tasks import Exam, TaskResult, load_tasks
from moecollab.manifest import check_manifest, manifest, read_json, refuse_existing, write_json

if TYPE_CHECKING:
    from moecollab.record.corpus import Source

KIND, FORMAT = "evaluation", 1
DOCUMENTS = {"document": pl.String, "domain": pl.String, "tokens": pl.Int64, "nll": pl.Float64}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What one model scored on a corpus and on tasks; complete in itself.

    Parameters
    ----------
    name : str
        What to call the model in tables.
    model : str
        Path it was loaded from, or its class.
    documents : DataFrame, optional
        Columns document, domain, tokens (predicted ones) and nll (their summed loss in nats).
    skipped : int
        Documents of fewer than two tokens, which have no row.
    tasks : tuple of TaskResult
        One per task, metric and filter.
    plan : mapping, optional
        The plan that masks the model, if it is masked.
    about : mapping
        The manifest: settings, digests of inputs, seed, versions.
    """

    name: str
    model: str
    documents: pl.DataFrame | None = None
    skipped: int = 0
    tasks: tuple[TaskResult, ...] = ()
    plan: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Loss on the corpus in nats per predicted token."""
        return _loss(self.measured())

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return float(np.exp(self.loss))

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the loss over documents; None for a single document."""
        return self._interval(self.measured())

    @property
    def by_domain(self) -> dict[str, float]:
        """Loss on each domain of the corpus, in nats per predicted token."""
        table = self.domain_table
        return dict(zip(table["domain"].to_list(), table["loss"].to_list(), strict=True))

    @property
    def domain_table(self) -> pl.DataFrame:
        """Columns domain, documents, tokens, loss, low, high; the interval is over documents."""
        rows = []
        whole = self.measured().sort("domain", maintain_order=True)
        for part in whole.partition_by("domain", maintain_order=True):
            low, high = self._interval(part) or (None, None)
            size = int(part["tokens"].sum())
            rows.append((part["domain"][0], part.height, size, _loss(part), low, high))
        names = ("domain", "documents", "tokens", "loss", "low", "high")
        kinds = (pl.String, pl.Int64, pl.Int64, *[pl.Float64] * 3)
        return pl.DataFrame(rows, schema=dict(zip(names, kinds, strict=True)), orient="row")

    @property
    def task_table(self) -> pl.DataFrame:
        """One row per task, metric and filter, without the values by question."""
        names = ("task", "metric", "filter", "value", "stderr", "higher_is_better", "n")
        kinds = (*[pl.String] * 3, *[pl.Float64] * 2, pl.Boolean, pl.Int64)
        rows = [[getattr(result, name) for name in names] for result in self.tasks]
        return pl.DataFrame(rows, schema=dict(zip(names, kinds, strict=True)), orient="row")

    @property
    def seed(self) -> int:
        """Seed of the evaluation, which its intervals use too."""
        return int(self.about.get("seed") or 0)

    def measured(self) -> pl.DataFrame:
        """The documents' table, or MissingInputError when no corpus was given."""
        if self.documents is None:
            raise MissingInputError(
                f"evaluation {self.name!r} has no loss; evaluate again with a corpus"
            )
        return self.documents

    def _interval(self, documents: pl.DataFrame) -> Interval | None:
        return ratio_interval(
            documents["nll"].to_numpy(),
            documents["tokens"].to_numpy().astype(np.float64),
            seed=self.seed,
        )

    def as_json(self) -> dict[str, Any]:
        """The evaluation as plain data, as it stands in its file."""
        table = None if self.documents is None else self.documents.to_dict(as_series=False)
        return dict(self.about) | {
            "kind": KIND,
            "format": FORMAT,
            "name": self.name,
            "model": self.model,
            "documents": table,
            "skipped": self.skipped,
            "tasks": [result.as_json() for result in self.tasks],
            "plan": None if self.plan is None else dict(self.plan),
        }

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the evaluation as JSON."""
        write_json(Path(path), self.as_json(), overwrite=overwrite)

    def __repr__(self) -> str:
        parts = []
        if self.documents is not None:
            low, high = self.interval or (float("nan"), float("nan"))
            parts.append(
                f"loss {self.loss:.4f} [{low:.4f}, {high:.4f}] nats per token on "
                f"{self.documents.height} documents"
            )
        parts += [
            f"{result.task} {result.metric} {result.value:.4g}"
            for result in self.tasks[:4]
            if result.value is not None
        ]
        return f"Evaluation({self.name}: {'; '.join(parts) or 'nothing measured'})"


def evaluate(  # noqa: PLR0913 (one parameter per option of the command)
    model: Any,  # noqa: ANN401 (a path or any causal language model)
    *,
    tokenizer: Any = None,  # noqa: ANN401 (any tokenizer)
    corpus: Source | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    context: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> Evaluation:
    """Loss of a model on held-out text and its results on lm-eval tasks.

    Parameters
    ----------
    model : path, model or Mask
        Full, masked or pruned: a folder, or a causal language model that is loaded.
    tokenizer : tokenizer, optional
        The model's own; only needed for a loaded model that does not come from a folder.
    corpus : path or documents, optional
        Text to measure the loss on, as for ``extract``; not the text the plan was made from.
    tasks : sequence of str
        Names of lm-eval tasks or groups.
    task_folder : path, optional
        Folder of YAML tasks of your own, in lm-eval's format.
    limit : int, optional
        Questions of each task, at least 1; all if not given. The corpus is always read whole.
    batch_size : int
        Sequences per forward pass, at least 1.
    context : int
        Tokens read at a time from a document, at least 2; or what the model takes if that is less.
    seed : int
        Seed of few-shot examples and of intervals, ≥ 0.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in; "auto" is that of the files.
    out : path, optional
        JSON file to write.
    overwrite : bool
        Whether `out` may be replaced.
    name : str, optional
        What to call the model in tables; the last part of its path if not given.

    Raises
    ------
    MissingInputError
        When neither corpus nor tasks are given, or the data of a task cannot be had.
    DataError
        When a loss is not finite, or lm-eval fails.
    """
    _check_settings(limit=limit, batch_size=batch_size, context=context, seed=seed)
    if corpus is None and not tasks:
        raise MissingInputError("there is nothing to measure; give a corpus, tasks or both")
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    from moecollab.evaluation.perplexity import HeldOut, document_losses, window_of
    from moecollab.evaluation.subject import open_subject
    from moecollab.record.corpus import read_corpus

    text = None if corpus is None else read_corpus(corpus)
    chosen = load_tasks(tasks, task_folder, limit=limit, seed=seed) if tasks else None
    subject = open_subject(model, tokenizer, dtype)
    window = window_of(subject.model.config, context)
    documents, skipped = None, 0
    if text is not None:
        held_out = HeldOut.read(subject.tokenizer, text, window)
        documents = document_losses(subject.model, held_out, batch_size=batch_size)
        skipped = held_out.skipped
    results: tuple[TaskResult, ...] = ()
    if chosen is not None:
        exam = Exam(subject.model, subject.tokenizer, chosen, batch_size=batch_size, seed=seed)
        results = exam.results()
    settings = {"tasks": list(tasks), "limit": limit, "batch_size": batch_size, "context": window}
    inputs = {"model": subject.digest} | ({} if text is None else {"corpus": text.digest})
    inputs |= {} if chosen is None else {"tasks": chosen.digest}
    found = Evaluation(
        name=name or subject.name,
        model=subject.path,
        documents=documents,
        skipped=skipped,
        tasks=results,
        plan=subject.plan,
        about=manifest(KIND, FORMAT, settings=settings, inputs=inputs, seed=seed),
    )
    if out is not None:
        found.save(out, overwrite=overwrite)
    return found


def load_evaluation(path: str | PathLike[str]) -> Evaluation:
    """The evaluation in a file that :meth:`Evaluation.save` wrote."""
    file = Path(path)
    found = read_json(file)
    check_manifest(found, KIND, FORMAT, file)
    try:
        return Evaluation(
            name=str(found.pop("name")),
            model=str(found.pop("model")),
            documents=_documents(found.pop("documents"), file),
            skipped=int(found.pop("skipped")),
            tasks=tuple(_task(result) for result in found.pop("tasks")),
            plan=found.pop("plan"),
            about=found,
        )
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as cause:
        if isinstance(cause, DataError):
            raise
        raise DataError(f"{file} is not a whole evaluation ({cause!r}); make it again") from cause


def _documents(columns: Mapping[str, Any] | None, file: Path) -> pl.DataFrame | None:
    """The documents' table in a file, checked so that a loss can be taken from it."""
    if columns is None:
        return None
    table = pl.DataFrame(dict(columns), schema=DOCUMENTS)
    whole = table.height > 0 and sum(table.null_count().row(0)) == 0
    if not whole or (table["tokens"] < 1).any() or not table["nll"].is_finite().all():
        raise DataError(f"{file} holds documents without tokens or loss; evaluate again")
    return table


def _loss(documents: pl.DataFrame) -> float:
    """Loss in nats per predicted token."""
    total, size = documents["nll"].to_numpy().sum(), documents["tokens"].to_numpy().sum()
    return float(total / size)


def _task(found: Mapping[str, Any]) -> TaskResult:
    return TaskResult(**(dict(found) | {"values": tuple(found["values"])}))


def _check_settings(*, limit: int | None, batch_size: int, context: int, seed: int) -> None:
    if limit is not None and limit < 1:
        raise SettingsError("limit", limit, "at least 1, or None for all questions")
    if batch_size < 1:
        raise SettingsError("batch_size", batch_size, "at least 1")
    if context < 2:
        raise SettingsError("context", context, "at least 2")
    if seed < 0:
        raise SettingsError("seed", seed, "at least 0")
