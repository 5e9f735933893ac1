"""What a criterion may be told about a model: its shape, its parameters, and runs of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import SettingsError, ShapeError

if TYPE_CHECKING:
    from moecollab.models.routing import MoeLayer
    from moecollab.record.activations import Activations
    from moecollab.record.corpus import Source
    from moecollab.record.counts import RoutingCounts

CONTEXT = 512
"""Most tokens of a window that a criterion runs a model on."""

Text: TypeAlias = "Source | Sequence[NDArray[np.integer[Any]]]"
"""A corpus, or token ids of windows where the text is tokenised already."""


@dataclass(frozen=True)
class Shape:
    """What scores are made for.

    Parameters
    ----------
    layers : tuple of int
        The model's own indices of its MoE layers.
    n_experts : int
        Routed experts in each layer; the most that one has where layers differ.
    top_k : int
        Experts that the router selects per token.
    experts_per_layer : tuple of int, optional
        Routed experts of every layer, where layers differ.
    """

    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    experts_per_layer: tuple[int, ...] | None = None

    @classmethod
    def of(cls, layers: Iterable[int], counts: Iterable[int], top_k: int) -> Shape:
        """The shape of a model with these layers and as many experts in each."""
        numbered = dict(zip(layers, counts, strict=True))
        held = tuple(numbered.values())
        differ = len(set(held)) > 1
        return cls(tuple(numbered), max(held), top_k, held if differ else None)

    @classmethod
    def recorded(cls, acts: Activations | RoutingCounts) -> Shape:
        """The shape of the model that a recording is of."""
        return cls.of(acts.layers, acts.experts_per_layer, acts.top_k)

    @classmethod
    def of_model(cls, layers: Sequence[MoeLayer]) -> Shape:
        """The shape of a model with these MoE layers."""
        counts = [layer.n_experts for layer in layers]
        top_k = max(layer.top_k for layer in layers)
        return cls.of([layer.layer for layer in layers], counts, top_k)


def check_same(recorded: Shape, model: Shape) -> None:
    """Raises ShapeError unless a model looks like the one that was recorded."""
    if recorded != model:
        raise ShapeError(
            f"the model has {len(model.layers)} MoE layers × {model.n_experts} experts, top "
            f"{model.top_k}, but the activations are of {len(recorded.layers)} × "
            f"{recorded.n_experts}, top {recorded.top_k}, or of other layers; give the model that "
            "was recorded"
        )


def read_probe(
    text: Text,
    model: Any,  # noqa: ANN401 (transformers is untyped)
    tokenizer: Any,  # noqa: ANN401
    tokens: int | None,
    seed: int,
) -> tuple[NDArray[np.int64], ...]:
    """Windows of token ids, in the order of the text; all of it, or a seeded choice of documents.

    Raises
    ------
    SettingsError
        When text is given and the model has no tokenizer.
    """
    from moecollab.models.routing import text_config
    from moecollab.record.corpus import read_corpus
    from moecollab.record.windows import cut_windows, select_samples

    if isinstance(text, Sequence) and text and isinstance(text[0], np.ndarray):
        return tuple(np.asarray(window, np.int64) for window in text)
    if tokenizer is None:
        raise SettingsError("corpus", text, "arrays of token ids for a model without a tokenizer")

    def tokenize(document: str) -> NDArray[np.uint32]:
        return np.asarray(tokenizer(document, verbose=False)["input_ids"], dtype=np.uint32)

    longest = getattr(text_config(model), "max_position_embeddings", None) or CONTEXT
    samples = select_samples(read_corpus(text), tokenize, limit=tokens, seed=seed)  # type: ignore[arg-type]
    windows = cut_windows(samples, min(CONTEXT, int(longest)))
    return tuple(window.ids.astype(np.int64) for window in windows)
