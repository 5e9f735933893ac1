"""Evaluations: what one model scored, wrote and took, and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from moecollab.errors import DataError, MissingInputError
from moecollab.evaluation.intervals import Interval, ratio_interval
from moecollab.evaluation.tasks import TaskResult
from moecollab.manifest import check_manifest, manifest, read_json, refuse_existing, write_json
from moecollab.settings import names_in

if TYPE_CHECKING:
    from moecollab.evaluation.batching import BatchSize
    from moecollab.evaluation.usage import Usage
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
    generations : DataFrame, optional
        What the model wrote, always the likeliest token: columns prompt (its document), domain,
        text (of the prompt), written (text) and ids (tokens written).
    usage : Usage, optional
        Speed and size.
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
    generations: pl.DataFrame | None = None
    usage: Usage | None = None
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
    def repetition(self) -> pl.DataFrame | None:
        """Repeated n-grams and loops of each continuation, as :func:`repetition` finds them."""
        from moecollab.evaluation.generation import repetition

        return None if self.generations is None else repetition(self.generations)

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
        return dict(self.about) | {
            "kind": KIND,
            "format": FORMAT,
            "name": self.name,
            "model": self.model,
            "documents": _columns(self.documents),
            "skipped": self.skipped,
            "tasks": [result.as_json() for result in self.tasks],
            "generations": _columns(self.generations),
            "usage": None if self.usage is None else self.usage.as_json(),
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
        written = self.repetition
        if written is not None:
            share = float(written["rep_4"].to_numpy().mean())
            parts.append(f"rep-4 {share:.3f} in {written.height} continuations")
        if self.usage is not None:
            parts.append(f"{self.usage.decode_speed:.1f} tokens/s")
        return f"Evaluation({self.name}: {'; '.join(parts) or 'nothing measured'})"


def evaluate(  # noqa: PLR0913 (one parameter per option of the command)
    model: Any,  # noqa: ANN401 (a path or any causal language model)
    *,
    tokenizer: Any = None,  # noqa: ANN401 (any tokenizer)
    corpus: Source | None = None,
    tasks: str | Sequence[str] = (),
    task_folder: str | PathLike[str] | None = None,
    limit: int | None = None,
    samples: str | PathLike[str] | None = None,
    generate: int = 0,
    prompts: Source | None = None,
    speed: bool = False,
    batch_size: BatchSize = 8,
    context: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> Evaluation:
    """What a model scores on text and tasks, what it writes, and what running it takes.

    A run with `out` that was stopped goes on where it was, by task, when started again alike.

    Parameters
    ----------
    model : path, model or Mask
        Full, masked or pruned: a folder, or a causal language model that is loaded.
    tokenizer : tokenizer, optional
        The model's own; only needed for a loaded model that does not come from a folder.
    corpus : path or documents, optional
        Text to measure the loss on, as for ``extract``; not the text the plan was made from.
    tasks : str or sequence of str
        Names of lm-eval tasks or groups, such as "arc_easy,piqa".
    task_folder : path, optional
        Folder of YAML tasks of your own, in lm-eval's format.
    limit : int, optional
        Questions of each task, at least 1, all if not given; and prompts, 32 if not given. The
        corpus is always read whole.
    samples : path, optional
        JSON lines (.jsonl) or Parquet file for every question and answer of the tasks.
    generate : int
        Tokens to go on with after each prompt, always the likeliest; 0 for none.
    prompts : path or documents, optional
        Text to go on with; if not given, the first 32 tokens of documents of the corpus.
    speed : bool
        Whether to measure tokens per second and bytes, see :class:`Usage`.
    batch_size : int or "auto"
        Sequences per forward pass, at least 1; "auto" for what memory holds.
    context : int
        Tokens read at a time from a document, at least 2; or what the model takes if that is less.
    seed : int
        Seed of few-shot examples and of intervals, ≥ 0.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in; "auto" is that of the files.
    out : path, optional
        JSON file to write.
    overwrite : bool
        Whether `out` and `samples` may be replaced.
    name : str, optional
        What to call the model in tables; the last part of its path if not given.

    Raises
    ------
    MissingInputError
        When there is nothing to measure, or the data of a task cannot be had.
    DataError
        When a loss is not finite, a token is not the model's, or lm-eval fails.
    """
    from moecollab.evaluation.parts import Material, Work, check_asked, check_settings
    from moecollab.evaluation.perplexity import window_of
    from moecollab.evaluation.samples import sample_table, write_samples
    from moecollab.evaluation.stages import Stages
    from moecollab.evaluation.subject import digest_tokenizer, open_subject

    exams = names_in("tasks", tasks)
    check_settings(
        limit=limit, batch_size=batch_size, context=context, seed=seed, generate=generate
    )
    log = check_asked(
        corpus=corpus,
        tasks=exams,
        prompts=prompts,
        generate=generate,
        speed=speed,
        samples=samples,
        overwrite=overwrite,
    )
    file = None if out is None else Path(out)
    if file is not None:
        refuse_existing(file, overwrite=overwrite)
    material = Material.read(corpus, prompts, exams, task_folder, limit=limit, seed=seed)
    subject = open_subject(model, tokenizer, dtype)
    window = window_of(subject.model.config, context)
    settings: dict[str, object] = {
        "tasks": exams,
        "limit": limit,
        "batch_size": batch_size,
        "context": window,
    }
    settings |= {"generate": generate} if generate else {}
    tokens = digest_tokenizer(subject.tokenizer, material.text or material.prompts)
    inputs = {"model": subject.digest, "base": subject.base, "tokenizer": tokens}
    inputs |= material.digests
    about = manifest(KIND, FORMAT, settings=settings, inputs=inputs, seed=seed)
    work = Work(
        subject=subject,
        material=material,
        stages=Stages(file, about),
        window=window,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
    )
    parts = work.losses() | work.generations(generate)
    results, answered = work.answers()
    parts |= {"tasks": results} | (work.usage() if speed else {})
    if log is not None:  # last, so that a run that was stopped does not find its own log
        write_samples(log, sample_table(answered))
    called = name or subject.name
    found = Evaluation(name=called, model=subject.path, plan=subject.plan, about=about, **parts)
    if file is not None:
        found.save(file, overwrite=overwrite)
        work.stages.clear()
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
            generations=_generations(found.pop("generations", None), file),
            usage=_usage(found.pop("usage", None)),
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


def _columns(table: pl.DataFrame | None) -> dict[str, list[Any]] | None:
    return None if table is None else table.to_dict(as_series=False)


def _generations(columns: Mapping[str, Any] | None, file: Path) -> pl.DataFrame | None:
    """The continuations in a file; files of before there were any have none."""
    if columns is None:
        return None
    from moecollab.evaluation.generation import SCHEMA

    table = pl.DataFrame(dict(columns), schema=SCHEMA)
    if table.height == 0 or sum(table.null_count().row(0)) or _holed(table["ids"]):
        raise DataError(f"{file} holds prompts that nothing was written to; evaluate again")
    return table


def _holed(lists: pl.Series) -> bool:
    """Whether a list has a null in it."""
    return lists.explode(empty_as_null=False).null_count() > 0


def _usage(found: Mapping[str, Any] | None) -> Usage | None:
    if found is None:
        return None
    from moecollab.evaluation.usage import Usage

    return Usage.from_json(found)


def _loss(documents: pl.DataFrame) -> float:
    """Loss in nats per predicted token."""
    total, size = documents["nll"].to_numpy().sum(), documents["tokens"].to_numpy().sum()
    return float(total / size)


def _task(found: Mapping[str, Any]) -> TaskResult:
    return TaskResult(**(dict(found) | {"values": tuple(found["values"])}))
