"""Watching the routing of a running model: hooks that leave its outputs as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moecollab.errors import DataError
from moecollab.models.capture import capture
from moecollab.models.routing import MoeLayer


@dataclass(frozen=True)
class Routing:
    """What one MoE layer did to some tokens, the largest weight first.

    Slots that were not used have expert 0 and zeros elsewhere.

    Parameters
    ----------
    expert : uint16 array of shape (n_tokens, top_k)
    weight : float32 array of shape (n_tokens, top_k)
    norm : float32 array of shape (n_tokens, top_k), or None
        L2 norm of the expert's output before the weight.
    peak : float32 array of shape (n_tokens, top_k), or None
        Largest magnitude in the expert's output before the weight.
    """

    expert: NDArray[np.uint16]
    weight: NDArray[np.float32]
    norm: NDArray[np.float32] | None
    peak: NDArray[np.float32] | None


@dataclass
class _Seen:
    """Tensors of one container call, as they were seen: (n_positions, top_k)."""

    ids: Tensor
    weights: Tensor
    norms: Tensor | None = None
    peaks: Tensor | None = None


class Recorder:
    """Hooks on the experts of some layers while a ``with`` block runs.

    Parameters
    ----------
    layers : sequence of MoeLayer
        Layers to watch.
    norms : bool
        Whether to record norms of expert outputs as well.
    """

    def __init__(self, layers: Sequence[MoeLayer], *, norms: bool) -> None:
        self._watches = [_Watch(layer, norms=norms) for layer in layers]

    def __enter__(self) -> Recorder:
        try:
            for watch in self._watches:
                watch.attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        for watch in self._watches:
            watch.detach()

    def take(self, real: Tensor) -> list[Routing]:
        """What each layer did since the last call, which must be one forward pass.

        Parameters
        ----------
        real : bool Tensor of shape (n_positions,)
            Positions of the batch, flattened, that hold tokens; others are padding.

        Raises
        ------
        DataError
            When a layer's weights or norms are not finite, naming the first such layer.
        """
        return [watch.take(real) for watch in self._watches]


class _Watch:
    """What is heard of one layer."""

    def __init__(self, layer: MoeLayer, *, norms: bool) -> None:
        self.layer = layer
        self.capture = capture(layer, self, outputs=norms)
        self.seen: list[_Seen] = []
        self.handles: Sequence[RemovableHandle] = []

    def attach(self) -> None:
        self.handles = self.capture.attach()

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen = [], []

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        self.seen.append(_Seen(ids, weights))

    def outputs(self, slots: Tensor) -> None:
        seen = self.seen[-1]
        seen.norms = torch.linalg.vector_norm(slots, dim=-1, dtype=torch.float32)
        # The maximum norm, written so that torch vectorises it.
        seen.peaks = torch.maximum(slots.amax(dim=-1), -slots.amin(dim=-1)).float()

    def total(self, routed: Tensor) -> None:
        pass

    def take(self, real: Tensor) -> Routing:
        seen, self.seen = self.seen, []
        if len(seen) != 1 or len(seen[0].ids) != len(real):
            rows = sum(len(one.ids) for one in seen)
            raise DataError(
                f"layer {self.layer.layer} saw {rows} rows in {len(seen)} calls for {len(real)} "
                "positions; this model does not run all tokens through its experts at once"
            )
        return self._routing(seen[0], real)

    def _routing(self, seen: _Seen, real: Tensor) -> Routing:
        chosen = real.to(seen.ids.device)
        parts = [seen.ids, seen.weights, seen.norms, seen.peaks]
        ids, weights, norms, peaks = (None if part is None else part[chosen] for part in parts)
        if ids is None or weights is None:
            raise DataError(f"layer {self.layer.layer} saw no routing; use the recorder once")
        self._check(weights, "routing weights")
        # Ids past the experts mean "none" or an identity, and a zero weight uses nothing.
        used = (ids < self.layer.n_experts) & (weights != 0)
        weights = weights * used
        if bool((weights[:, 1:] > weights[:, :-1]).any()):
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            ids, used = ids.gather(1, order), used.gather(1, order)
            norms, peaks = (
                None if part is None else part.gather(1, order) for part in (norms, peaks)
            )
        outputs = []
        for part in (norms, peaks):
            outputs.append(None if part is None else (part * used).cpu().numpy())
            if part is not None:
                self._check(part[used], "expert outputs")
        expert = (ids * used).cpu().numpy().astype(np.uint16)
        return Routing(expert, weights.cpu().numpy(), outputs[0], outputs[1])

    def _check(self, values: Tensor, what: str) -> None:
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{what} of layer {self.layer.layer} are not finite; the weights are damaged or "
                "overflow in this dtype: check the checkpoint or use float32"
            )
