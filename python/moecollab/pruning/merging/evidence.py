"""Where what is known of the experts comes from: text that is run, or a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from moecollab.criteria.probe import Shape, Text, check_same, read_probe
from moecollab.criteria.probing.probing import Windows
from moecollab.errors import MissingInputError
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.pruning.merging.methods import Method
from moecollab.pruning.merging.seen import Recorded, Seen, observe
from moecollab.record.activations import Activations
from moecollab.record.counts import RoutingCounts, open_recorded
from moecollab.record.tallies import Tallies


@dataclass(frozen=True)
class Source:
    """Text to run a model on, or a recording of it.

    Parameters
    ----------
    model, tokenizer : causal language model and its tokenizer
        Loaded.
    activations : Activations, RoutingCounts or path, optional
        A recording.
    corpus : Text, optional
        Text, which goes before a recording.
    tokens, seed : int
        Most tokens of the text, and the seed of their choice.
    """

    model: Any
    tokenizer: Any
    activations: Activations | RoutingCounts | str | PathLike[str] | None
    corpus: Text | None
    tokens: int | None
    seed: int

    @cached_property
    def windows(self) -> Windows:
        """The text as windows of token ids."""
        if self.corpus is None:
            raise MissingInputError("text is needed to run the experts on; pass corpus= (--corpus)")
        found = read_probe(self.corpus, self.model, self.tokenizer, self.tokens, self.seed)
        return [window for window in found if len(window)]

    @cached_property
    def tallies(self) -> Tallies:
        """Sums of the recording, over all domains."""
        if self.activations is None:
            raise MissingInputError(
                "nothing is known of the experts; pass corpus= (--corpus), or activations= that "
                "were recorded with collect='channels'"
            )
        acts = open_recorded(self.activations)
        check_same(Shape.recorded(acts), Shape.of_model(find_moe_layers(self.model)))
        return acts.tallies().total()

    def each(
        self, layers: Sequence[MoeLayer], method: Method, *, grouped: bool
    ) -> Iterator[tuple[MoeLayer, Seen | Recorded | None]]:
        """What is known of each layer; nothing where groups are given and averages are plain.

        Raises
        ------
        MissingInputError
            When the method needs more than there is.
        """
        if self.corpus is not None:
            router = method.reads_router
            found = observe(self.model, layers, self.windows, router=router)
            yield from ((one.layer, one) for one in found)
            return
        if grouped and method.shares == "equal":
            yield from ((layer, None) for layer in layers)
            return
        if not method.recorded and not (grouped and method.shares == "counts"):
            raise MissingInputError(
                f"{method.name} runs all experts on text; pass corpus= (--corpus)"
            )
        yield from self.recorded(layers)

    def recorded(self, layers: Sequence[MoeLayer]) -> Iterator[tuple[MoeLayer, Recorded]]:
        """What the recording knows of each layer."""
        order = [layer.layer for layer in find_moe_layers(self.model)]
        for layer in layers:
            yield layer, Recorded(self.tallies, order.index(layer.layer), layer.n_experts)
