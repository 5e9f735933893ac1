"""Router repair: routers and norms of a pruned model, distilled from the whole one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moecollab.embedded import located
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.evaluation.intervals import Interval, paired_interval
from moecollab.evaluation.perplexity import HeldOut, Window, window_of
from moecollab.evaluation.repairing.distilling import Course, Pair, distil
from moecollab.evaluation.repairing.trainable import Trainable
from moecollab.manifest import read_json, refuse_existing
from moecollab.models.keep import Keep, check_cut, check_keep, read_keep
from moecollab.models.loading import ModelLike, load_model, load_tokenizer
from moecollab.models.masked import (
    MASK_FILE,
    PRUNED,
    composed,
    cut_in_memory,
    original_of,
    read_masked,
)
from moecollab.models.routing import find_moe_layers
from moecollab.models.uneven import Arrangement
from moecollab.pruning.card import Making, Size, about, origin_of
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.pruning import SHARD, check_uniform, prune, write_card, written
from moecollab.pruning.streaming.folder import Writing
from moecollab.record.corpus import Corpus, Source, read_corpus

CONTEXT = 512
MOST_HELD_OUT = 64
"""Documents to choose the best state by, and as many to judge it by, at most."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repaired model, and what the repair brought on text that it did not see.

    Parameters
    ----------
    model : Module
        The small model.
    before, after : float
        KL(whole ‖ small) on the documents kept to judge, in nats per token.
    interval : Interval, optional
        95 % interval of the gain, paired bootstrap over those documents; None for a single one.
    steps : int
        Batches trained on.
    documents : int
        Documents that judged.
    """

    model: Any
    before: float
    after: float
    interval: Interval | None
    steps: int
    documents: int

    @property
    def gain(self) -> float:
        """How much nearer to the whole model the small one is, in nats per token."""
        return self.before - self.after

    def as_json(self) -> dict[str, object]:
        """The numbers as plain data."""
        ends = None if self.interval is None else list(self.interval)
        found = {"before": self.before, "after": self.after, "gain": self.gain, "interval": ends}
        return {**found, "steps": self.steps, "documents": self.documents}

    def __repr__(self) -> str:
        low, high = self.interval or (float("nan"), float("nan"))
        return (
            f"Repair(KL from the whole model {self.before:.4f} before, {self.after:.4f} after "
            f"{self.steps} steps: gain {self.gain:.4f} [{low:.4f}, {high:.4f}] nats per token)"
        )


def repair(  # noqa: PLR0913 (each is a setting of the training)
    model: ModelLike,
    corpus: Source,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    teacher: ModelLike | None = None,
    steps: int = 200,
    minutes: float | None = None,
    rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Repair:
    """Trains routers and norms of a pruned model to predict what the whole one does.

    All other weights stay. With a plan, the model is whole: it teaches, and learns under a mask, so
    that memory holds one set of experts; then it is pruned. With a teacher, the model is small
    already, by pruning or merging, and both are in memory. A fifth of the documents of every domain
    are not trained on: by half of these the best state is chosen, the one before training among
    them, and by the others the gain is judged.

    Parameters
    ----------
    model : Module, path or hub name
        The whole model if there is a plan, else the small one; a loaded one is changed.
    corpus : path, Corpus or iterable of documents
        Calibration text, three documents at least.
    plan : Plan or path, optional
        Kept experts, equally many in every layer.
    teacher : Module, path or hub name, optional
        The whole model, in place of a plan.
    steps : int
        Batches at most, ≥ 0; a run ends when three of its ten looks at held-out text found no gain.
    minutes : float, optional
        Time after which training ends, > 0. Results then depend on the machine's speed.
    rate : float
        Adam's step size at the start, > 0.
    batch_size : int
        Windows per batch, ≥ 1.
    seed : int
        Seed of the split and of the order, ≥ 0.
    out : path, optional
        Folder for the checkpoint.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    SettingsError
        When not just one of plan and teacher is given, or a number is out of range.
    DataError
        When there is no tokenizer, or too little text.
    PlanError
        When the plan does not fit the model.

    Notes
    -----
    After Router KD (distil the router only); norms and the choice of the best state are added here.
    """
    model = located(model)
    _check(plan, teacher)
    course = Course(steps, minutes, rate, batch_size, seed)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise UnsupportedModelError(f"{model} is a masked model; give its base and the plan")
    loaded, tokenizer = load_model(model)
    keep = None if plan is None else _kept(plan, loaded)
    whole, other = (loaded, None) if teacher is None else load_model(teacher)
    words = tokenizer or other or _tokenizer(loaded, whole)
    windows = [_windows(words, part, loaded) for part in _parts(read_corpus(corpus), seed)]
    decided = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    why, before = (
        about(
            model,
            keep or Arrangement.as_is(find_moe_layers(loaded)).keep,
            decided if isinstance(decided, Plan) else None,
        ),
        Size.of_model(loaded),
    )
    student, since = Trainable(loaded, keep), cut_in_memory(loaded)
    found = _repaired(Pair(student, whole), windows, course)
    if plan is not None and keep is not None:
        prune(loaded, load_plan(plan) if isinstance(plan, str | PathLike) else plan)
    student.write()
    if out is not None:
        layers = find_moe_layers(loaded)
        arrangement = Arrangement.as_is(layers) if keep is None else Arrangement(keep, keep, False)
        note = _note(origin_of(model), arrangement, keep, since) | {"repaired": found.as_json()}
        writing = Writing(shard_size=SHARD, overwrite=overwrite)
        with written(loaded, words, model, Path(out), note, writing) as folder:
            write_card(folder, why, arrangement, before, _making(found, keep))
    return found


def _check(plan: object, teacher: object) -> None:
    if (plan is None) == (teacher is None):
        given = "neither" if plan is None else "both"
        raise SettingsError("plan and teacher", given, "one of the two")


def _kept(plan: Plan | str | PathLike[str], model: nn.Module) -> Keep:
    keep = read_keep(load_plan(plan) if isinstance(plan, str | PathLike) else plan)
    layers = find_moe_layers(model)
    check_uniform(keep)
    check_keep(keep, layers)
    check_cut(layers)
    return keep


def _tokenizer(*models: Any) -> Any:  # noqa: ANN401
    """The tokenizer in the folder that one of the models came from."""
    names = [str(getattr(model, "name_or_path", "")) for model in models]
    found = next((load_tokenizer(name) for name in names if name), None)
    if found is None:
        raise DataError("the model has no tokenizer beside it; give the folder of one that has")
    return found


def _parts(corpus: Corpus, seed: int) -> tuple[Corpus, Corpus, Corpus]:
    """Documents to train on, to choose by and to judge by: of each domain 8, 1 and 1 of ten."""
    rng, parts = np.random.default_rng(seed), ([], [], [])  # type: tuple[Any, tuple[list[Any], ...]]
    place = 0  # goes on over domains, so that those with few documents take part as well
    for domain in corpus.domains:
        inside = [document for document in corpus.documents if document.domain == domain]
        for row in rng.permutation(len(inside)).tolist():
            part = {0: 1, 5: 2}.get(place % 10, 0)
            place += 1
            full = part and len(parts[part]) >= MOST_HELD_OUT
            parts[0 if full else part].append(inside[row])
    if not all(parts):
        raise DataError(f"{len(corpus)} documents are too few to hold any out; give ten or more")
    train, choose, judge = (Corpus(tuple(part)) for part in parts)
    return train, choose, judge


def _windows(tokenizer: Any, corpus: Corpus, model: Any) -> list[Window]:  # noqa: ANN401
    return list(HeldOut.read(tokenizer, corpus, window_of(model.config, CONTEXT)).windows)


def _repaired(pair: Pair, windows: Sequence[Sequence[Window]], course: Course) -> Repair:
    """Trains, and judges what it brought."""
    train, choose, judge = windows
    training = [(one, one.training) for one in (pair.student.model, pair.teacher)]
    for model, _ in training:
        model.eval()
    try:
        before = pair.measure(judge, course.batch_size)
        steps = distil(pair, train, choose, course)
        after = pair.measure(judge, course.batch_size)
    finally:
        for model, mode in training:
            model.train(mode)
    sums = [_by_document(one, judge) for one in (before, after)]
    size = _by_document(np.array([len(window.ids) for window in judge], np.float64), judge)
    return Repair(
        model=pair.student.model,
        before=float(sums[0].sum() / size.sum()),
        after=float(sums[1].sum() / size.sum()),
        interval=paired_interval(sums[0], sums[1], size, seed=course.seed),
        steps=steps,
        documents=len(size),
    )


def _by_document(values: Any, windows: Sequence[Window]) -> Any:  # noqa: ANN401
    """Sums of the windows of each document that has any."""
    rows = np.array([window.document for window in windows])
    return np.bincount(rows, weights=values)[np.unique(rows)]


def _note(
    origin: str, arrangement: Arrangement, keep: Keep | None, since: Keep | None
) -> dict[str, Any]:
    """What is written beside the model: what is kept, or what the small model came with.

    `since` is what was cut in memory before, of the model in the folder `origin`.
    """
    if keep is not None:
        return {"kind": PRUNED} | arrangement.note(original_of(origin, keep, since))
    if since is not None:
        kept = composed(since, arrangement.keep)
        note = {"kind": PRUNED} | arrangement.note(original_of(origin, kept))
        return note | {"experts": kept.as_json()}
    file = Path(origin) / MASK_FILE
    before = read_json(file) if file.is_file() else {"kind": "repaired model"}
    return {"loads": arrangement.loads} | before


def _making(found: Repair, keep: Keep | None) -> Making:
    """What the card says of the training."""
    trained = "training its routers and norms to predict what the whole model does"
    return Making(
        done=trained if keep is None else f"removing routed experts and {trained}",
        title="routers and norms repaired" if keep is None else "",
        heading="What was trained" if keep is None else "What was dropped and trained",
        lines=(
            f"- **Repair**: KL from the whole model {found.before:.4f} nats a token before and "
            f"{found.after:.4f} after {found.steps} steps, on {found.documents} documents that "
            f"were not trained on: gain {found.gain:.4f}, {_sure(found)}.",
        ),
        planned=keep is not None,
    )


def _sure(found: Repair) -> str:
    if found.interval is None:
        return "too few documents for an interval"
    low, high = found.interval
    return f"95 % interval [{low:.4f}, {high:.4f}]"
