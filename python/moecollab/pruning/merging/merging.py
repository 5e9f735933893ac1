"""Merging experts: groups of them become one each, and the checkpoint as small as after pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecollab.criteria.probe import Text
from moecollab.embedded import located
from moecollab.errors import MissingInputError, SettingsError, UnsupportedModelError, unknown_name
from moecollab.manifest import refuse_existing
from moecollab.models.keep import check_cut, check_keep, check_untied
from moecollab.models.loading import ModelLike, load_model
from moecollab.models.masked import cut_in_memory, note_cut, original_of, read_masked
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.slicing import Change, all_or_nothing, slice_experts, slice_router
from moecollab.models.stacks import expert_stacks, replace_stacks
from moecollab.progress import track
from moecollab.pruning.card import Size, about, origin_of
from moecollab.pruning.counts import set_count
from moecollab.pruning.merging.averaging import Group, Match, average_rows, averaged
from moecollab.pruning.merging.deciding import GroupsLike, Wanted, decided, read_wanted
from moecollab.pruning.merging.evidence import Source
from moecollab.pruning.merging.methods import METHODS, ROUTERS, Method, Router
from moecollab.pruning.merging.neurons import Neurons, activity_match, find_neurons, weight_match
from moecollab.pruning.merging.novices import with_novices
from moecollab.pruning.merging.seen import SAMPLE, Seen
from moecollab.pruning.merging.telling import of_groups, of_novices, places_of
from moecollab.pruning.plans import Plan, load_plan
from moecollab.pruning.pruning import SHARD, check_uniform, write_card, written
from moecollab.pruning.streaming.folder import Writing
from moecollab.record.activations import Activations
from moecollab.record.counts import RoutingCounts

NOVICES = "mone"
FEW = 8
"""Tokens on which it is tried where neurons are."""


def merge(  # noqa: PLR0913 (a method may need any of these)
    model: ModelLike,
    plan: Plan | str | PathLike[str] | GroupsLike,
    *,
    how: str = "hc_smoe",
    activations: Activations | RoutingCounts | str | PathLike[str] | None = None,
    corpus: Text | None = None,
    tokens: int | None = None,
    router: Router | None = None,
    align: bool | None = None,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Any:  # noqa: ANN401 (transformers is untyped)
    """Merges groups of experts into one each; the model is as small as after pruning by the plan.

    Each method's groups, averages and deviations from its paper are in
    :mod:`moecollab.pruning.merging.methods`. A loaded model is changed in place, or, after an
    error, not at all.

    Parameters
    ----------
    model : Module, path or hub name
        The whole model.
    plan : Plan, path, or mapping of int to sequence of sequence of int
        How many experts every layer keeps and, for ``m_smoe`` and ``ream``, around which the others
        are merged; or the groups themselves, by layer.
    how : {"hc_smoe", "m_smoe", "dek", "ream", "mone"}
        The method. Under ``mone`` every expert that the plan drops becomes a constant, its mean
        output over the tokens routed to it, which takes an output bias; the model gets no smaller.
    activations : Activations, RoutingCounts or path, optional
        A recording with ``collect="channels"``, which answers ``hc_smoe`` and ``mone``.
    corpus : path, Corpus, iterable of documents, or sequence of int64 arrays, optional
        Text on which all experts are run, for every method; it goes before a recording.
    tokens : int, optional
        Most tokens of the text to run, ≥ 1; all if None.
    router : {"dominant", "mean"}, optional
        Router row of a group: of the expert that gives the group its place, or the average; the
        method's own if None.
    align : bool, optional
        Whether neurons are brought into one order before averaging; as the method does if None.
    seed : int
        Seed of the choice of text under a limit, ≥ 0.
    out : path, optional
        Folder for the checkpoint; its ``moecollab.json`` says which experts were merged.
    overwrite : bool
        Whether `out` may be replaced.

    Returns
    -------
    Module
        The smaller model.

    Raises
    ------
    MissingInputError
        When the method needs text, or a recording of more.
    PlanError
        When the plan or the groups do not fit the model.
    UnsupportedModelError
        When the family cannot be cut, run expert by expert, aligned or, under ``mone``, hold a
        constant.
    """
    model = located(model)
    _check(how, router, align)
    if out is not None:
        refuse_existing(Path(out), overwrite=overwrite)
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise UnsupportedModelError(
            f"{model} is a masked model; merge experts of the model that it masks instead"
        )
    loaded, tokenizer = load_model(model)
    layers = find_moe_layers(loaded)
    wanted = read_wanted(plan, layers)
    check_keep(wanted.keep, layers)
    check_cut(layers)
    check_untied(loaded, layers)
    why, before = about(model, wanted.keep, _plan_of(plan)), Size.of_model(loaded)
    source, since = (
        Source(loaded, tokenizer, activations, corpus, tokens, seed),
        cut_in_memory(loaded),
    )
    with torch.no_grad(), _evaluating(loaded):
        if how == NOVICES:
            with_novices(layers, wanted, source)
            told = of_novices(wanted.keep, layers)
        else:
            check_uniform(wanted.keep)
            adjusted = _adjusted(METHODS[how], router, align)
            groups = _merge(loaded, layers, wanted, adjusted, source)
            told = of_groups(wanted, groups, adjusted)
    if out is not None:
        original = original_of(origin_of(model), told.arrangement.keep, since)
        note = told.arrangement.note(original) | told.note
        writing = Writing(shard_size=SHARD, overwrite=overwrite)
        with written(loaded, tokenizer, model, Path(out), note, writing) as folder:
            write_card(folder, why, told.arrangement, before, told.making)
    return loaded


def _plan_of(plan: object) -> Plan | None:
    """The plan with its reasons, if it was one."""
    found = load_plan(plan) if isinstance(plan, str | PathLike) else plan
    return found if isinstance(found, Plan) else None


def _check(how: str, router: str | None, align: bool | None) -> None:
    if how not in (*METHODS, NOVICES):
        raise unknown_name("how", how, [*METHODS, NOVICES])
    if router is not None and router not in ROUTERS:
        raise SettingsError("router", router, f"one of {', '.join(ROUTERS)}")
    if how == NOVICES and (router, align) != (None, None):
        raise SettingsError("router and align", (router, align), "left out under mone")


def _adjusted(method: Method, router: Router | None, align: bool | None) -> Method:
    """The method with what was asked for in place of its own."""
    how = method.align if align is None else (align and (method.align or "weights")) or ""
    return replace(method, router=router or method.router, align=how)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, afterwards in the modes of before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _merge(
    model: Any,  # noqa: ANN401
    layers: Sequence[MoeLayer],
    wanted: Wanted,
    method: Method,
    source: Source,
) -> dict[int, list[Group]]:
    """Merges all layers, or changes nothing; gives the groups of each."""
    groups: dict[int, list[Group]] = {}
    parts = [[layer] for layer in layers] if method.in_order else [layers]
    finder = _NeuronFinder()
    with all_or_nothing() as changes, track(f"merging by {method.name}", len(layers)) as bar:
        for part in parts:
            known = list(_decisions(part, wanted, method, source))
            for layer, chosen, seen in known:
                groups[layer.layer] = chosen
                changes += _merge_layer(layer, chosen, method, finder.of(layer, seen, method))
                bar.advance()
    set_count(model, layers[0], len(groups[layers[0].layer]))
    note_cut(model, places_of(wanted.keep, groups))
    return groups


def _decisions(
    layers: Sequence[MoeLayer], wanted: Wanted, method: Method, source: Source
) -> Iterator[tuple[MoeLayer, list[Group], Seen | None]]:
    """Groups of each layer, and of what was seen what merging takes."""
    for layer, known in source.each(layers, method, grouped=wanted.groups is not None):
        groups = decided(layer, wanted, method, known)
        check_keep(places_of(wanted.keep, {layer.layer: groups}), [layer])
        if isinstance(known, Seen):
            known.forget(SAMPLE if method.align == "activity" else FEW)
        yield layer, groups, known if isinstance(known, Seen) else None


def _merge_layer(
    layer: MoeLayer, groups: Sequence[Group], method: Method, aligned: _Aligned
) -> list[Change]:
    """Merges the experts of one layer and cuts the others; undone if it fails."""
    kept = [group.centre for group in groups]
    merged = averaged(expert_stacks(layer), groups, aligned.neurons, aligned.match)
    with all_or_nothing() as changes:
        if method.router == "mean":
            changes += average_rows(layer, groups)
        changes += slice_router(layer, kept)
        changes += slice_experts(layer, kept)
        changes += replace_stacks(layer, merged)
    return changes


@dataclass(frozen=True)
class _Aligned:
    """Where the neurons are and how they are matched; nothing where experts are not aligned."""

    neurons: Neurons | None = None
    match: Match | None = None


class _NeuronFinder:
    """Finds the neurons of layers, once for all that store them alike."""

    def __init__(self) -> None:
        self.known: dict[object, Neurons] = {}

    def of(self, layer: MoeLayer, seen: Seen | None, method: Method) -> _Aligned:
        """The neurons of a layer and how the method matches them."""
        if not method.align:
            return _Aligned()
        if seen is None:
            raise MissingInputError(
                "aligning neurons runs the experts on some tokens; pass corpus= (--corpus), or "
                "align=False (--no-align)"
            )
        shapes = tuple((name, value.shape) for name, value in expert_stacks(layer).items())
        if shapes not in self.known:
            few = seen.sample[:FEW]
            self.known[shapes] = find_neurons(layer, lambda: seen.everyone.outputs_of(few))
        neurons = self.known[shapes]
        if method.align == "activity":
            return _Aligned(neurons, partial(activity_match, neurons, rows=seen.sample))
        return _Aligned(neurons, partial(weight_match, neurons))
