"""The parts of an evaluation: read before the model is loaded, then measured one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl

from moecollab.errors import MissingInputError, SettingsError
from moecollab.evaluation.batching import BatchSize, in_batches
from moecollab.evaluation.generation import (
    OPENING,
    SCHEMA,
    Prompts,
    check_room,
    check_tokens,
    continuations,
)
from moecollab.evaluation.perplexity import SCHEMA as DOCUMENTS
from moecollab.evaluation.perplexity import HeldOut, document_losses
from moecollab.evaluation.samples import check_samples
from moecollab.evaluation.stages import Stages
from moecollab.evaluation.subject import Subject
from moecollab.evaluation.tasks import Exam, Questions, TaskResult, load_tasks
from moecollab.evaluation.usage import Usage, measure_usage
from moecollab.record.corpus import Corpus, Source, read_corpus


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a model is measured on.

    Parameters
    ----------
    text, prompts : Corpus, optional
        Held-out text, and what the model goes on with.
    questions : Questions, optional
        Of lm-eval tasks.
    """

    text: Corpus | None
    prompts: Corpus | None
    questions: Questions | None

    @classmethod
    def read(
        cls,
        corpus: Source | None,
        prompts: Source | None,
        tasks: Sequence[str],
        task_folder: str | PathLike[str] | None,
        **asking: Any,  # noqa: ANN401 (limit and seed)
    ) -> Material:
        """Reads text and questions from their files."""
        return cls(
            text=None if corpus is None else read_corpus(corpus),
            prompts=None if prompts is None else read_corpus(prompts),
            questions=load_tasks(tasks, task_folder, **asking) if tasks else None,
        )

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each part that is there."""
        found = {"corpus": self.text, "prompts": self.prompts, "tasks": self.questions}
        return {name: part.digest for name, part in found.items() if part is not None}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One model and how it is measured.

    Parameters
    ----------
    subject : Subject
        The model.
    material : Material
        What it reads.
    stages : Stages
        What a stopped run has done already.
    window : int
        Tokens read at a time.
    batch_size : int or "auto"
        Sequences per forward pass.
    limit : int or None
        Prompts at most.
    seed : int
        Seed of all that is drawn.
    """

    subject: Subject
    material: Material
    stages: Stages
    window: int
    batch_size: BatchSize
    limit: int | None
    seed: int

    def losses(self) -> dict[str, Any]:
        """Loss of each document, and how many are too short."""
        subject, text = self.subject, self.material.text
        if text is None:
            return {}
        held_out = HeldOut.read(subject.tokenizer, text, self.window)
        for window in held_out.windows:
            check_tokens(window.ids, subject.model)

        def measured(size: int) -> pl.DataFrame:
            return document_losses(subject.model, held_out, batch_size=size)

        table = self._table("documents", DOCUMENTS, measured)
        return {"documents": table, "skipped": held_out.skipped}

    def generations(self, tokens: int) -> dict[str, Any]:
        """What the model writes after each prompt; nothing for 0 tokens."""
        given, text = self.material.prompts, self.material.text
        source = given or text
        if not tokens or source is None:
            return {}
        check_room(tokens, self.window)
        model, tokenizer = self.subject.model, self.subject.tokenizer
        room, opening = self.window - tokens, None if given else OPENING
        prompts = Prompts.read(tokenizer, source, limit=self.limit, opening=opening, room=room)

        def written(size: int) -> pl.DataFrame:
            return continuations(model, tokenizer, prompts, tokens=tokens, batch_size=size)

        return {"generations": self._table("generations", SCHEMA, written)}

    def answers(self) -> tuple[tuple[TaskResult, ...], Mapping[str, Any]]:
        """Results on the tasks, and what was asked and answered by task."""
        questions = self.material.questions
        if questions is None:
            return (), {}

        def answered(size: int) -> tuple[tuple[TaskResult, ...], Any]:
            model, tokenizer, keep = self.subject.model, self.subject.tokenizer, self.stages.part
            exam = Exam(model, tokenizer, questions, batch_size=size, seed=self.seed, keep=keep)
            return exam.logged()

        results, samples = self._in_batches(answered)
        return results, samples

    def usage(self) -> dict[str, Any]:
        """Speed and size."""

        def measured() -> dict[str, Any]:
            model, folder = self.subject.model, self.subject.folder
            return measure_usage(model, folder, window=self.window, seed=self.seed).as_json()

        return {"usage": Usage.from_json(self.stages.part("usage", measured))}

    def _table(
        self, name: str, schema: dict[str, Any], make: Callable[[int], pl.DataFrame]
    ) -> pl.DataFrame:
        """A table, made in batches unless it was kept."""
        found = self.stages.part(name, lambda: self._in_batches(make).to_dict(as_series=False))
        return pl.DataFrame(found, schema=schema)

    def _in_batches(self, work: Callable[[int], Any]) -> Any:  # noqa: ANN401
        return in_batches(self.batch_size, self.subject.model, self.window, work)


def check_settings(
    *,
    limit: int | None,
    batch_size: BatchSize,
    context: int,
    seed: int,
    generate: int,
) -> None:
    """Raises SettingsError for a number out of range."""
    if limit is not None and limit < 1:
        raise SettingsError("limit", limit, "at least 1, or None for all questions")
    wrong = batch_size < 1 if isinstance(batch_size, int) else str(batch_size) != "auto"
    if wrong:
        raise SettingsError("batch_size", batch_size, 'at least 1, or "auto"')
    if context < 2:
        raise SettingsError("context", context, "at least 2")
    if seed < 0:
        raise SettingsError("seed", seed, "at least 0")
    if generate < 0:
        raise SettingsError("generate", generate, "a number of tokens, or 0 to write nothing")


def check_asked(
    *,
    corpus: object,
    tasks: Sequence[str],
    prompts: object,
    generate: int,
    speed: bool,
    samples: str | PathLike[str] | None,
    overwrite: bool,
) -> Path | None:
    """The log to write, once what is asked for goes together; before any work.

    Raises
    ------
    MissingInputError
        When there is nothing to measure, or an option needs another.
    """
    if corpus is None and not tasks and not generate and not speed:
        raise MissingInputError(
            "there is nothing to measure; give a corpus, tasks or both, or ask for speed"
        )
    if generate and corpus is None and prompts is None:
        raise MissingInputError("there is nothing to go on with; give prompts or a corpus")
    if prompts is not None and not generate:
        raise MissingInputError("prompts are not used; say how much to write, as in generate=128")
    if samples is None:
        return None
    if not tasks:
        raise MissingInputError("samples log what tasks asked; give tasks, or leave samples out")
    return check_samples(samples, overwrite=overwrite)
