"""Running the windows of a probe through a model, which is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.criteria.base import Evidence
from moecollab.errors import (
    DataError,
    MissingInputError,
    SettingsError,
    UnsupportedModelError,
)
from moecollab.models.groups import router_groups
from moecollab.models.keep import Keep, check_routers
from moecollab.models.masked import layer_barred, layer_masked
from moecollab.models.routing import MoeLayer, find_moe_layers

Model: TypeAlias = Any  # a causal language model; transformers is untyped
FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What the code of a model raises when it is run in a way that it was not written for."""

Windows: TypeAlias = Sequence[NDArray[np.int64]]


def subject(evidence: Evidence) -> tuple[Model, list[MoeLayer], Windows]:
    """The model of the evidence, its MoE layers and the windows of the probe.

    Raises
    ------
    MissingInputError
        When there is no model or no text.
    """
    windows = [window for window in evidence.probe if len(window)]
    if evidence.model is None or not windows:
        raise MissingInputError("a model and text are needed; pass model= and corpus=")
    return evidence.model, find_moe_layers(evidence.model), windows


def check_masks(layers: Sequence[MoeLayer], n_dropped: Sequence[int]) -> None:
    """Raises unless any experts of every layer can be masked, so many of each at a time.

    Raises
    ------
    SettingsError
        When fewer experts than a token chooses would be left.
    UnsupportedModelError
        When the routers cannot be masked, as those that choose by groups without a bias.
    """
    counts = tuple(layer.n_experts for layer in layers)
    for layer, n in zip(layers, n_dropped, strict=True):
        if layer.n_experts - n < layer.top_k:
            raise SettingsError(
                "drop",
                f"{n} of {layer.n_experts} experts",
                f"such that no fewer than the {layer.top_k} that a token chooses are left",
            )
    left = [tuple(range(count - n)) for count, n in zip(counts, n_dropped, strict=True)]
    if router_groups(layers[0]) is not None:
        with hidden(layers[0], left[0]):  # raises if the router has no bias to choose by
            return
    kept = {layer.layer: ids for layer, ids in zip(layers, left, strict=True)}
    check_routers(Keep(kept, max(counts), layers[0].top_k, experts_per_layer=counts), layers)


@contextmanager
def hidden(layer: MoeLayer, kept: Sequence[int] | None) -> Iterator[None]:
    """Leaves a layer's router only some experts to choose, or all if None."""
    if kept is None:
        yield
        return
    hide = layer_masked if router_groups(layer) is None else layer_barred
    with hide(layer, kept):
        yield


def inputs_of(model: Model, window: NDArray[np.int64], copies: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass on one window, or on several copies of it."""
    ids = torch.from_numpy(np.array(window)).to(model.device).expand(copies, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def logits_in(model: Model, output: Any) -> Tensor:  # noqa: ANN401
    """Logits in what a model returned: (n_rows, n_tokens, n_words).

    Raises
    ------
    UnsupportedModelError
        When the model has no head that predicts tokens.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts no tokens, so there is no loss; load the model with "
            "its language-model head"
        )
    return logits


def losses_of(logits: Tensor, window: NDArray[np.int64]) -> Tensor:
    """Next-token loss of a window in nats, summed, of each row: float64 (n_rows,)."""
    ids = torch.from_numpy(np.array(window[1:])).to(logits.device)
    return torch.stack([_loss(row[: len(ids)], ids) for row in logits])


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
    return losses.double().sum()


def finite(losses: Tensor, where: str) -> Tensor:
    """The losses as they are.

    Raises
    ------
    DataError
        When one is not finite; `where` says on what.
    """
    if not bool(losses.isfinite().all()):
        raise not_finite(f"the loss on {where}")
    return losses


def not_finite(what: str) -> DataError:
    """The error of a model that computes NaN or infinity."""
    return DataError(
        f"{what} is not finite; look for NaN in the model's weights, or load it as float32"
    )


@contextmanager
def differentiable(model: nn.Module, wanted: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Gradients with respect to some parameters alone; afterwards to those of before."""
    before = [(one, one.requires_grad) for one in model.parameters()]
    chosen = {id(one) for one in wanted}
    try:
        for one, _ in before:
            one.requires_grad_(id(one) in chosen)
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        for one, flag in before:
            one.requires_grad_(flag)
