"""One pass over text: the largest outputs of every expert and the largest hidden states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.errors import DataError
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.models.streamed import decoder_layers
from moecollab.progress import track
from moecollab.record.reading import Batch, cut_batches
from moecollab.record.recorder import Recorder, Routing
from moecollab.record.windows import Sample

SHARED = -1
"""Expert number of a layer's shared experts, which are one module."""
_SHARED_NAME = re.compile(r"(^|\.)shared_(expert|experts|mlp)$")
_MEDIAN_OF = 1 << 16  # entries of a batch's hidden states, of whole tokens: enough for a median


@dataclass(frozen=True)
class Profile:
    """What a model's experts and layers put out at most on a text.

    Parameters
    ----------
    experts : DataFrame
        One row per expert: layer, expert (-1 for what is shared), tokens (routed to it), max_abs
        (largest magnitude in any output channel before the weight, float32 of the model; 0 if never
        routed), position (in its window), token_id and channel of that entry, first_row (the same
        of the first token alone that each window routes to it, the heaviest slot first), windows
        (that route to it), at_first (share of these where its largest entry is at position 0),
        first_weight and other_weight (mean weight at position 0 and elsewhere; 0 where not chosen).
    hidden : DataFrame
        One row per decoder layer, -1 for the embeddings: layer, max_abs of the hidden states after
        it, median_abs of the batch that holds it, position, token_id and channel, and `before`,
        the magnitude that went into the layer at that place.
    n_layers : int
        Decoder layers.
    n_tokens, n_windows : int
        What was read.
    """

    experts: pl.DataFrame
    hidden: pl.DataFrame
    n_layers: int
    n_tokens: int
    n_windows: int


def profile(model: Any, samples: Sequence[Sample], *, context: int, batch_size: int) -> Profile:  # noqa: ANN401
    """Profiles a loaded model on some samples; positions count from each window's beginning.

    Raises
    ------
    DataError
        When a hidden state or an output is not finite.
    UnsupportedModelError
        When the model is dense or its decoder layers are no list.
    """
    layers = find_moe_layers(model)
    batches = cut_batches(samples, context, batch_size)
    routed = [_Outputs(layer.layer, layer.n_experts) for layer in layers]
    with _Stream(model) as stream, _Shared(model, layers) as shared:
        _run(model, layers, batches, routed, stream, shared)
    windows = sum(len(batch.ids) for batch in batches)
    tables = [one.table() for one in (*routed, *shared.outputs.values())]
    return Profile(
        experts=pl.concat(tables).sort("layer", "expert"),
        hidden=stream.table(),
        n_layers=len(stream.layers),
        n_tokens=sum(len(batch.rows) for batch in batches),
        n_windows=windows,
    )


def _run(
    model: Any,  # noqa: ANN401
    layers: Sequence[MoeLayer],
    batches: Sequence[Batch],
    routed: Sequence[_Outputs],
    stream: _Stream,
    shared: _Shared,
) -> None:
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        n_tokens = sum(len(batch.rows) for batch in batches)
        recorder, bar = Recorder(layers, norms=True), track("profile", n_tokens)
        with recorder, torch.inference_mode(), bar as shown:
            for batch in batches:
                inputs, real = batch.inputs(device)
                places = Places.of(batch)
                stream.begin(places, real)
                shared.begin(places, real)
                recorder.begin(real)
                model.base_model(**inputs)
                for outputs, routing in zip(routed, recorder.take(real), strict=True):
                    outputs.add(places, routing)
                shown.advance(len(batch.rows))
    finally:
        model.train(training)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch stand: window, position in it and token id, (n_tokens,) each."""

    window: NDArray[np.int64]
    position: NDArray[np.int64]
    token_id: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch) -> Places:
        """Those of the real tokens, window after window."""
        window, position = np.nonzero(batch.real)
        return cls(window, position, batch.ids[batch.real])


class _Outputs:
    """The largest outputs so far of the experts of one layer."""

    def __init__(self, layer: int, n_experts: int, first: int = 0) -> None:
        self.layer, self.first = layer, first
        self.max_abs, self.first_row = np.zeros(n_experts), np.zeros(n_experts)
        self.where = np.zeros((n_experts, 3), np.int64)  # position, token id, channel
        self.tokens, self.windows, self.at_first = np.zeros((3, n_experts), np.int64)
        self.weights = np.zeros((2, n_experts))  # at position 0, elsewhere
        self.read = np.zeros(2, np.int64)

    def add(self, places: Places, routing: Routing) -> None:
        """Adds one batch."""
        if routing.peak is None or routing.channel is None:
            return
        n_experts, (row, slot) = len(self.max_abs), np.nonzero(routing.weight)
        expert = routing.expert[row, slot].astype(np.int64)
        peak, weight = routing.peak[row, slot], routing.weight[row, slot].astype(np.float64)
        position = places.position[row]
        self.tokens += np.bincount(expert, minlength=n_experts)
        for number, here in enumerate((position == 0, position != 0)):
            self.weights[number] += np.bincount(expert[here], weight[here], n_experts)
        firsts = int((places.position == 0).sum())
        self.read += (firsts, len(places.position) - firsts)
        # The largest entry comes first, and among equals the earliest token.
        order = np.argsort(-peak, kind="stable")
        key = places.window[row] * n_experts + expert
        top = order[_first_of(key[order])]
        self.windows += np.bincount(expert[top], minlength=n_experts)
        self.at_first += np.bincount(expert[top][position[top] == 0], minlength=n_experts)
        begun = np.lexsort((position, slot))
        begun = begun[_first_of(key[begun])]
        np.maximum.at(self.first_row, expert[begun], peak[begun])
        best = order[_first_of(expert[order])]
        better = best[peak[best] > self.max_abs[expert[best]]]
        self.max_abs[expert[better]] = peak[better]
        token = places.token_id[row[better]]
        channel = routing.channel[row[better], slot[better]]
        self.where[expert[better]] = np.stack((position[better], token, channel), axis=1)

    def table(self) -> pl.DataFrame:
        """One row per expert."""
        n_experts, (first, other) = len(self.max_abs), self.weights
        at_first = self.at_first / np.maximum(self.windows, 1)
        return pl.DataFrame(
            {
                "layer": np.full(n_experts, self.layer, np.int64),
                "expert": self.first + np.arange(n_experts),
                "tokens": self.tokens,
                "max_abs": self.max_abs,
                "position": self.where[:, 0],
                "token_id": self.where[:, 1],
                "channel": self.where[:, 2],
                "first_row": self.first_row,
                "windows": self.windows,
                "at_first": at_first,
                "first_weight": first / max(self.read[0], 1),
                "other_weight": other / max(self.read[1], 1),
            }
        )


def _first_of(keys: NDArray[np.int64]) -> NDArray[np.intp]:
    """Places at which each key comes for the first time."""
    return np.unique(keys, return_index=True)[1]


class _Hooks:
    """Hooks that are on while a ``with`` block runs, told what each forward pass holds."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.places, self.real = Places(*np.zeros((3, 0), np.int64)), torch.empty(0)

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, places: Places, real: Tensor) -> None:
        """Says what the next forward pass holds."""
        self.places, self.real = places, real


class _Shared(_Hooks):
    """Listens to the shared experts of some layers while a ``with`` block runs."""

    def __init__(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        self.modules = shared_experts(model, layers)
        self.outputs = {layer: _Outputs(layer, 1, SHARED) for layer in self.modules}
        super().__init__()

    def __enter__(self) -> _Shared:
        for layer, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self._hook(layer)))
        return self

    def _hook(self, layer: int) -> Any:  # noqa: ANN401
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:  # noqa: ANN401
            rows = output.detach().reshape(len(self.real), -1)[self.real]
            peak, channel = (one.cpu().numpy() for one in rows.float().abs().max(dim=-1))
            ones = np.ones((len(peak), 1), np.float32)
            routing = Routing(
                expert=np.zeros((len(peak), 1), np.uint16),
                weight=ones,
                peak=peak[:, None],
                channel=channel[:, None].astype(np.int32),
            )
            self.outputs[layer].add(self.places, routing)

        return hook


def shared_experts(model: nn.Module, layers: Sequence[MoeLayer]) -> dict[int, nn.Module]:
    """The module of each layer's shared experts, by layer; those without have no entry."""
    decoder = cast(nn.ModuleList, model.get_submodule(decoder_layers(model)))
    found: dict[int, nn.Module] = {}
    for layer in layers:
        for name, module in decoder[layer.layer].named_modules():
            if _SHARED_NAME.search(name) and layer.layer not in found:
                found[layer.layer] = module
    return found


class _Stream(_Hooks):
    """Listens to what goes from decoder layer to decoder layer while a ``with`` block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(cast(nn.ModuleList, model.get_submodule(decoder_layers(model))))
        self.rows: list[dict[str, float]] = [{} for _ in range(len(self.layers) + 1)]
        super().__init__()

    def __enter__(self) -> _Stream:
        for number, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_hook(self._hook(number), with_kwargs=True))
        return self

    def _hook(self, number: int) -> Any:  # noqa: ANN401
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
            before = self._flat(args[0] if args else kwargs["hidden_states"])
            if number == 0:
                self._add(0, before, before)
            self._add(number + 1, self._flat(first_tensor(output)), before)

        return hook

    def _flat(self, hidden: Tensor) -> Tensor:
        return hidden.detach().reshape(len(self.real), -1)[self.real]

    def _add(self, row: int, hidden: Tensor, before: Tensor) -> None:
        low, high = (float(one) for one in hidden.aminmax())
        largest = max(-low, high)
        if not np.isfinite(largest):
            raise DataError(
                f"hidden states after layer {row - 1} are not finite; load the model as float32 or "
                "look for NaN in its weights"
            )
        if largest <= self.rows[row].get("max_abs", -1.0):
            return
        magnitude = hidden.float().abs()
        place = int(magnitude.argmax())
        token, channel = divmod(place, hidden.shape[1])
        some = magnitude[:: 1 + magnitude.numel() // _MEDIAN_OF]
        self.rows[row] = {
            "max_abs": largest,
            "median_abs": float(some.median()),
            "position": int(self.places.position[token]),
            "token_id": int(self.places.token_id[token]),
            "channel": channel,
            "before": abs(float(before.reshape(-1)[place])),
        }

    def table(self) -> pl.DataFrame:
        """One row per layer, the embeddings first."""
        rows = [{"layer": number - 1, **row} for number, row in enumerate(self.rows)]
        return pl.DataFrame(rows)


def first_tensor(output: Any) -> Tensor:  # noqa: ANN401 (whatever a layer returns)
    """The hidden states among what a decoder layer returns."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def without_shared(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """A model whose shared experts of some layers put out zeros while the block runs."""
    modules = shared_experts(model, find_moe_layers(model))

    def zero(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        return torch.zeros_like(output)

    handles = [modules[layer].register_forward_hook(zero) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
