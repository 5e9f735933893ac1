"""What a model does without some experts, beside others drawn at random."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from moecollab.analysis.profiling import SHARED, without_shared
from moecollab.analysis.sinks import Mass, decay, sink_mass
from moecollab.analysis.super_experts import SuperExperts
from moecollab.evaluation.generation import OPENING, Prompts, continuations
from moecollab.evaluation.intervals import paired_interval
from moecollab.evaluation.perplexity import HeldOut, document_losses
from moecollab.evaluation.repetition import ends_in_loop, repeated
from moecollab.evaluation.subject import Subject
from moecollab.models.gains import Gains
from moecollab.progress import track
from moecollab.record.corpus import Corpus

Experts: TypeAlias = Sequence[tuple[int, int]]
"""(layer, expert); expert -1 is a layer's shared ones."""

SINK_WINDOWS, SINK_TOKENS = 8, 256
PROMPTS = 8
_NGRAM = 3


@dataclass(frozen=True)
class _Trial:
    """What is measured with and without experts: the text, prompts and windows for attention."""

    subject: Subject
    text: HeldOut
    prompts: Prompts | None
    write: int
    windows: Sequence[Sequence[int]]
    batch_size: int

    def measure(self) -> tuple[pl.DataFrame, dict[str, float], Mass]:
        """Losses by document, repetition of what is written, attention on the first token."""
        model = self.subject.model
        losses = document_losses(model, self.text, batch_size=self.batch_size)
        return losses, self._repetition(), sink_mass(model, self.windows)

    def _repetition(self) -> dict[str, float]:
        if self.prompts is None:
            return {}
        written = continuations(
            self.subject.model,
            self.subject.tokenizer,
            self.prompts,
            tokens=self.write,
            batch_size=self.batch_size,
        )["ids"].to_list()
        return {
            "repeated": float(np.mean([repeated(ids, _NGRAM) for ids in written])),
            "loops": float(np.mean([ends_in_loop(ids) for ids in written])),
        }


def ablate(
    subject: Subject,
    found: SuperExperts,
    corpus: Corpus,
    *,
    seeds: int,
    write: int,
    context: int,
    batch_size: int,
) -> SuperExperts:
    """Takes super experts away, together and one by one, and others at random beside them.

    What is taken away puts out zeros and the router stays as it is, as in the paper. Each draw of
    the controls takes as many routed experts as there are routed super ones, none of which is
    super: of the whole model, or of the layers of the super ones. Nothing is measured where there
    are neither super experts nor outliers.

    Parameters
    ----------
    subject : Subject
        The model that `found` is about.
    found : SuperExperts
        What was found.
    corpus : Corpus
        Held-out text.
    seeds : int
        Draws of each control.
    write : int
        Tokens that are written after each of eight beginnings, to see repetition; none if 0.
    context, batch_size : int
        Tokens of a window, and windows of a batch.

    Returns
    -------
    SuperExperts
        `found` with `effects`, one row for each set of experts (set, seed, experts, nll: nats a
        token, added with low and high over documents, repeated: 3-grams that come again, loops:
        share of texts that end in a loop), and `sinks`, the decay by set and layer; no sinks where
        the model returns no attention weights.
    """
    sets = list(_sets(found, seeds))
    if not sets:
        return found
    trial = _trial(subject, corpus, write=write, context=context, size=batch_size)
    whole = trial.measure()
    effects, gone = [_effect("none", 0, (), whole, whole)], []
    with track("taking experts away", len(sets)) as bar:
        for name, seed, experts in sets:
            with without(subject.model, experts):
                measured = trial.measure()
            effects.append(_effect(name, seed, experts, measured, whole))
            table = decay(whole[2], measured[2])
            gone.append(table.select(pl.lit(name).alias("set"), pl.lit(seed).alias("seed"), "*"))
            bar.advance(1)
    sinks = pl.concat(gone)
    return replace(found, effects=pl.DataFrame(effects), sinks=sinks if sinks.height else None)


def _trial(subject: Subject, corpus: Corpus, *, write: int, context: int, size: int) -> _Trial:
    held = HeldOut.read(subject.tokenizer, corpus, context)
    prompts = None
    if write:
        prompts = Prompts.read(subject.tokenizer, corpus, limit=PROMPTS, opening=OPENING)
    longest = sorted(held.windows, key=lambda one: -len(one.ids))[:SINK_WINDOWS]
    windows = [one.ids[:SINK_TOKENS] for one in longest]
    return _Trial(subject, held, prompts, write, windows, size)


def _sets(found: SuperExperts, seeds: int) -> Iterator[tuple[str, int, Experts]]:
    """Name, seed and experts of everything that is taken away."""
    supers, outliers = found.found, found.outliers
    if supers:
        yield "super", 0, supers
    for layer, expert in supers if len(supers) > 1 else ():
        yield f"super {layer}:{'shared' if expert == SHARED else expert}", 0, [(layer, expert)]
    if outliers:
        yield "outliers", 0, outliers
    routed = [one for one in supers if one[1] != SHARED]
    if not routed:
        return
    others = found.experts.filter((pl.col("kind") != "super") & (pl.col("expert") != SHARED))
    everyone = sorted(others.select("layer", "expert").iter_rows())
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(len(everyone))[: len(routed)]
        yield "random", seed, [everyone[i] for i in drawn]
        yield "random, same layers", seed, _same_layers(everyone, routed, rng)


def _same_layers(everyone: Experts, routed: Experts, rng: np.random.Generator) -> Experts:
    """As many others of each layer as there are of these."""
    chosen: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in routed}):
        others = [one for one in everyone if one[0] == layer]
        n = sum(one[0] == layer for one in routed)
        chosen.extend(others[i] for i in rng.permutation(len(others))[:n])
    return chosen


@contextmanager
def without(model: Any, experts: Experts) -> Iterator[None]:  # noqa: ANN401
    """A model in which some experts, shared ones too, put out zeros while the block runs."""
    routed = {one: 0.0 for one in experts if one[1] != SHARED}
    shared = [layer for layer, expert in experts if expert == SHARED]
    with Gains(model, routed), without_shared(model, shared):
        yield


def _effect(
    name: str,
    seed: int,
    experts: Experts,
    measured: tuple[pl.DataFrame, Mapping[str, float], Mass],
    whole: tuple[pl.DataFrame, Mapping[str, float], Mass],
) -> dict[str, Any]:
    """One row of the effects."""
    losses, full = measured[0], whole[0]
    tokens = full["tokens"].to_numpy().astype(np.float64)
    nll, was = losses["nll"].to_numpy(), full["nll"].to_numpy()
    ends = paired_interval(nll, was, tokens, seed=0)
    row: dict[str, Any] = {"set": name, "seed": seed, "experts": [list(one) for one in experts]}
    row |= {"nll": nll.sum() / tokens.sum(), "added": (nll - was).sum() / tokens.sum()}
    row |= {"low": ends.low if ends else None, "high": ends.high if ends else None}
    return row | dict(measured[1])
