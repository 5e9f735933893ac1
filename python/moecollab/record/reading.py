"""Batches of text, and running a model over them that is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.models.allocation import give_back
from moecollab.models.loading import digest_model
from moecollab.models.routing import MoeLayer, find_moe_layers
from moecollab.progress import Bar
from moecollab.record.recorder import Recorder, Routing
from moecollab.record.windows import Sample, cut_windows, group_batches

_FIELDS = ("expert", "weight", "norm", "peak", "channel", "next")
_POSITIONS = 4_096  # that are read before free memory is given back: it takes 1 to 30 ms


@dataclass(frozen=True)
class Batch:
    """Windows that a model reads together, padded at their ends.

    Parameters
    ----------
    ids : int64 array of shape (n_windows, longest)
        Token ids; 0 where there is none.
    real : bool array of shape (n_windows, longest)
        Where there are tokens.
    rows : int64 array of shape (n_tokens,)
        Rows of the tokens in the shard, window after window.
    """

    ids: NDArray[np.int64]
    real: NDArray[np.bool_]
    rows: NDArray[np.int64]

    def inputs(self, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """What the model is called with, and which of its positions, flattened, are real."""
        mask = torch.from_numpy(self.real).to(device)
        ids = torch.from_numpy(self.ids).to(device)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        return inputs, mask.reshape(-1)


def cut_batches(samples: Sequence[Sample], context: int, size: int) -> list[Batch]:
    """All tokens of a shard, in batches of windows of like length."""
    windows = cut_windows(samples, context)
    first = np.cumsum([0, *(len(window.ids) for window in windows)])
    batches = []
    for chosen in group_batches(windows, size):
        lengths = np.array([len(windows[number].ids) for number in chosen])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate([windows[number].ids for number in chosen])
        rows = np.concatenate([np.arange(first[n], first[n + 1]) for n in chosen])
        batches.append(Batch(ids, real, rows))
    return batches


@dataclass(frozen=True)
class Piece:
    """A batch, and the columns of its shard.

    Parameters
    ----------
    batch : Batch
        What the model reads.
    columns : list of Routing
        One entry per MoE layer, with a row for each token of the shard; to be filled.
    domain : int64 array of shape (n_tokens,)
        Number of each token's domain.
    """

    batch: Batch
    columns: list[Routing]
    domain: NDArray[np.int64]

    def begin(self, recorder: Recorder, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Says what is coming; what the model is called with, and which positions are real."""
        inputs, real = self.batch.inputs(device)
        domain = np.zeros(self.batch.real.shape, np.int64)
        domain[self.batch.real] = self.domain
        recorder.begin(real, torch.from_numpy(domain.reshape(-1)))
        return inputs, real

    def fill(self, layer: int, routing: Routing) -> None:
        """Writes what a layer did to the batch; fewer slots than columns leave zeros."""
        into = self.columns[layer]
        for name in _FIELDS:
            column, value = getattr(into, name), getattr(routing, name)
            if column is not None and value is not None:
                column[self.batch.rows, : value.shape[1]] = value
        if into.shift is not None and routing.shift is not None:
            into.shift[self.batch.rows] = routing.shift
        self.columns[layer] = replace(into, sums=routing.sums, mass=routing.mass)


Listen: TypeAlias = Callable[[Sequence[MoeLayer]], Recorder]  # makes one for some layers


class Reader(Protocol):
    """A way to run a model over batches; in use while a ``with`` block runs."""

    model: Any

    def __enter__(self) -> object: ...

    def __exit__(self, *_error: object) -> None: ...

    def announce(self, lengths: Sequence[int], positions: int, n_domains: int) -> None:
        """Says what to expect of shards of these lengths, read so many tokens at once."""

    def digest(self) -> str:
        """Digest of the model."""

    def group(self, lengths: Sequence[int]) -> int:
        """How many of the next shards, of these lengths in tokens, are read together."""

    def record(self, pieces: Sequence[Piece], listen: Listen, bar: Bar, folder: Path) -> None:
        """Fills the columns of some pieces, shard by shard; `folder` may be used meanwhile."""


class WholeReader:
    """Runs a model that is in memory, or that accelerate spread over memories.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model = model
        self._training = {name: one.training for name, one in model.named_modules()}

    def __enter__(self) -> WholeReader:
        self.model.eval()
        return self

    def __exit__(self, *_error: object) -> None:
        for name, one in self.model.named_modules():
            one.training = self._training.get(name, one.training)

    def announce(self, lengths: Sequence[int], positions: int, n_domains: int) -> None:
        """Says nothing."""

    def digest(self) -> str:
        """Digest of the model."""
        return digest_model(self.model)

    def group(self, lengths: Sequence[int]) -> int:
        """One shard at a time."""
        return min(1, len(lengths))

    def record(
        self,
        pieces: Sequence[Piece],
        listen: Listen,
        bar: Bar,
        folder: Path,  # noqa: ARG002 (part of the protocol)
    ) -> None:
        """Fills the columns of the pieces of one shard, batch by batch."""
        device, read = _device(self.model), 0
        with listen(find_moe_layers(self.model)) as recorder:
            for piece in pieces:
                inputs, real = piece.begin(recorder, device)
                with torch.inference_mode():
                    # The base model, because nobody reads the logits here.
                    self.model.base_model(**inputs)
                for layer, routing in enumerate(recorder.take(real)):
                    piece.fill(layer, routing)
                bar.advance(len(piece.batch.rows))
                read += piece.batch.real.size
                if read >= _POSITIONS:
                    give_back()
                    read = 0


def _device(model: Any) -> torch.device:  # noqa: ANN401
    """Where a model takes its inputs; accelerate moves them from there to where they are needed."""
    held = (value.device for value in model.parameters() if not value.is_meta)
    return next(held, torch.device("cpu"))
