"""Recording a model that does not fit into memory: every text through one layer, then the next.

The model's own forward runs as always, on the same batches, so that what is recorded is what it
would be with the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from moecollab.errors import SettingsError
from moecollab.models.allocation import returned
from moecollab.models.replay import Replay
from moecollab.models.routing import find_moe_layers, text_config
from moecollab.models.streamed import StreamedModel
from moecollab.progress import Bar, say, track
from moecollab.record.reading import Listen, Piece
from moecollab.record.recorder import Recorder
from moecollab.record.shelf import Shelf
from moecollab.record.sums import names_of, zeros

_SLOT_BYTES = 2 + 4 * 4  # an expert id, a weight, a norm, a peak and its channel
_GB = 1_000_000_000


class LayerReader:
    """Runs a model whose weights stay on disk, but for the layer in use.

    Parameters
    ----------
    streamed : StreamedModel
        The model.
    hidden_gb : float
        Gigabytes of hidden states that may be held in memory; more are written to disk.
    groups : sequence of str
        What is summed; every shard in memory holds its sums of channels.
    """

    def __init__(
        self, streamed: StreamedModel, *, hidden_gb: float, groups: Sequence[str] = ()
    ) -> None:
        if not hidden_gb >= 0:
            raise SettingsError("hidden_gb", hidden_gb, "0 or more")
        self.streamed = streamed
        self.model: Any = streamed.model
        self.groups = groups
        self.n_domains = 1
        self.most = int(min(hidden_gb, 1e9) * _GB)
        self.moe = find_moe_layers(streamed.model)
        self.replay = Replay(streamed.layers, type(streamed.model).__name__)
        self._stack = ExitStack()

    def __enter__(self) -> LayerReader:
        self._stack.enter_context(returned())
        self._stack.enter_context(self.streamed.outside())
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def digest(self) -> str:
        """Digest of the model; reads all weights once and checks that they are finite."""
        with track("check weights", len(self.streamed.layers)) as bar:
            return self.streamed.digest(bar.advance)

    def group(self, lengths: Sequence[int]) -> int:
        """As many shards as fit into what may be held, and at least one.

        More shards at once would go to disk and back for every layer, which is as slow as reading
        the weights again, and a killed run would lose more.
        """
        size = self._state_bytes() + self._column_bytes()
        count = total = 0
        for length in lengths:
            total += length * size + self._shard_bytes()
            if count and total > self.most:
                break
            count += 1
        return count

    def _state_bytes(self) -> int:
        """Hidden state of a token."""
        return int(text_config(self.model).hidden_size) * int(self.model.dtype.itemsize)

    def _column_bytes(self) -> int:
        """What is recorded of a token."""
        return sum(layer.top_k for layer in self.moe) * _SLOT_BYTES

    def _shard_bytes(self) -> int:
        """What is recorded of a shard besides its tokens: sums of channels, of all domains."""
        return self._sums_bytes([group for group in self.groups if group == "channels"])

    def _sums_bytes(self, groups: Sequence[str]) -> int:
        """Sums of some groups over all domains."""
        shape = (1, 1, max(layer.n_experts for layer in self.moe))
        width = int(text_config(self.model).hidden_size)
        each = sum(zeros(name, shape, width).nbytes for name in names_of(groups))
        return self.n_domains * len(self.moe) * each

    def announce(self, lengths: Sequence[int], positions: int, n_domains: int) -> None:
        """Says how much memory will be needed, from the headers of the files."""
        self.n_domains = n_domains
        count = self.group(lengths)
        tokens = sum(lengths[:count])
        hidden = min(self.most, tokens * self._state_bytes())
        # Rows of a batch: as they are, once per slot before and after the weights, in float32.
        slots = 2 * max(layer.top_k for layer in self.moe)
        working = positions * int(text_config(self.model).hidden_size) * 4 * (4 + slots)
        parts = {
            "embeddings": self.streamed.outside_bytes,
            "one layer": self.streamed.layer_bytes,
            "hidden states": hidden,
            # Every shard has its sums, and there are those of all shards before.
            "routing": tokens * self._column_bytes()
            + count * self._shard_bytes()
            + self._sums_bytes(self.groups),
            "a batch": working,
        }
        told = ", ".join(f"{name} {size / _GB:.2g}" for name, size in parts.items())
        say(
            f"layer by layer: about {sum(parts.values()) / _GB:.2g} GB ({told}) besides the "
            "program and what torch keeps (up to 0.5), for weights of "
            f"{self.streamed.weight_bytes / _GB:.2g} GB"
        )

    def record(self, pieces: Sequence[Piece], listen: Listen, bar: Bar, folder: Path) -> None:
        """Fills the columns of some pieces; reads the weights of each layer once."""
        last = max(layer.layer for layer in self.moe)  # nothing is recorded after it
        with Shelf(folder, self.most, self.streamed.device) as shelf:
            for number in range(last + 1):
                bar.remark(f"layer {number + 1} of {last + 1}")
                watched = [one for one in self.moe if one.layer == number]
                places = list(enumerate(pieces))
                with self.streamed.layer(number):
                    # A recorder sums over a shard, as it does when the model is whole.
                    for _, shard in groupby(places, lambda entry: id(entry[1].columns)):
                        with listen(watched) as recorder:
                            for place, piece in shard:
                                self._run(number, (place, piece), recorder, shelf)
                                bar.advance(len(piece.batch.rows) / (last + 1))

    def _run(self, number: int, entry: tuple[int, Piece], recorder: Recorder, shelf: Shelf) -> None:
        """Runs one batch through one layer and writes down what it did, if it has experts."""
        place, piece = entry
        inputs, real = piece.begin(recorder, self.streamed.device)
        with torch.inference_mode():
            given = self.replay.run(
                number, shelf.get(place), lambda: self.model.base_model(**inputs)
            )
        shelf.put(place, given)
        for routing in recorder.take(real):
            row = next(row for row, one in enumerate(self.moe) if one.layer == number)
            piece.fill(row, routing)
