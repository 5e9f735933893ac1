"""Watching the routing of a running model: hooks that leave its outputs as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import DataError
from moecollab.models.capture import capture
from moecollab.models.routing import MoeLayer
from moecollab.record.mass import Mass
from moecollab.record.outputs import OutputReader, Readings
from moecollab.record.residual import Residual


@dataclass(frozen=True)
class Routing:
    """What one MoE layer did to some tokens, the largest weight first.

    Slots that were not used have expert 0 and zeros elsewhere; what was not asked for is None.

    Parameters
    ----------
    expert : uint16 array of shape (n_tokens, top_k)
    weight : float32 array of shape (n_tokens, top_k)
    norm : float32 array of shape (n_tokens, top_k), or None
        L2 norm of the expert's output before the weight.
    peak : float32 array of shape (n_tokens, top_k), or None
        Largest magnitude in the expert's output before the weight.
    channel : int32 array of shape (n_tokens, top_k), or None
        The first channel that has it.
    shift : float32 array of shape (n_tokens,), or None
        1 − cosine between the residual stream before and after the routed experts.
    next : uint16 array of shape (n_tokens, n_next), or None
        Experts that were not chosen, the most probable first.
    sums : float64 array of shape (n_domains · n_experts, 2, hidden), or None
        Sums of the outputs and of their squares, over all batches so far.
    mass : float64 array of shape (n_domains, n_experts), or None
        Sums of the router's probabilities before top-k, over all batches so far.
    """

    expert: NDArray[np.uint16]
    weight: NDArray[np.float32]
    norm: NDArray[np.float32] | None = None
    peak: NDArray[np.float32] | None = None
    channel: NDArray[np.int32] | None = None
    shift: NDArray[np.float32] | None = None
    next: NDArray[np.uint16] | None = None
    sums: NDArray[np.float64] | None = None
    mass: NDArray[np.float64] | None = None


@dataclass
class _Seen:
    """What one call told: (n_positions, top_k) each; of slots, flattened; shift (n_positions,)."""

    ids: Tensor
    weights: Tensor
    site: Tensor = field(default_factory=lambda: torch.empty(0))
    counted: Tensor = field(default_factory=lambda: torch.empty(0))
    readings: Readings | None = None
    shift: Tensor | None = None


class Recorder:
    """Hooks on the experts of some layers while a ``with`` block runs.

    Parameters
    ----------
    layers : sequence of MoeLayer
        Layers to watch.
    norms : bool
        Whether to record norms and largest entries of expert outputs as well.
    channels : bool
        Whether to sum the outputs channel by channel; needs `norms`.
    shift : Module, optional
        The model, when it shall be recorded how far the experts turn its residual stream.
    probability : bool
        Whether to sum what the routers make of every expert before top-k.
    n_next : int
        Experts of a token to record beyond the chosen ones, the most probable first.
    n_domains : int
        Domains to sum apart.
    n_experts : int, optional
        Experts of each domain in the sums; the most of any of these layers if None.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        *,
        norms: bool,
        channels: bool = False,
        shift: nn.Module | None = None,
        probability: bool = False,
        n_next: int = 0,
        n_domains: int = 1,
        n_experts: int | None = None,
    ) -> None:
        self._batch = _Batch()
        n_experts = n_experts or max((layer.n_experts for layer in layers), default=0)
        self._watches = []
        for layer in layers:
            reader = OutputReader(n_domains * n_experts, channels=channels) if norms else None
            residual = None if shift is None else Residual(shift, layer)
            wanted = probability or n_next > 0
            mass = Mass(layer, (n_domains, n_experts), n_next) if wanted else None
            self._watches.append(_Watch(layer, self._batch, n_experts, reader, residual, mass))

    def __enter__(self) -> Recorder:
        try:
            for watch in self._watches:
                watch.attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._detach()

    def _detach(self) -> None:
        for watch in self._watches:
            watch.detach()

    def begin(self, real: Tensor, domain: Tensor | None = None) -> None:
        """Says what the next forward pass holds, for sums that are taken while it runs.

        Parameters
        ----------
        real : bool Tensor of shape (n_positions,)
            Positions of the batch, flattened, that hold tokens; others are padding.
        domain : int64 Tensor of shape (n_positions,), optional
            Number of each position's domain; all of one domain if None.
        """
        self._batch.real, self._batch.domain = real, domain

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


@dataclass
class _Batch:
    """What the running forward pass holds; the recorder's watches share it."""

    real: Tensor | None = None
    domain: Tensor | None = None


class _Watch:
    """What is heard of one layer."""

    def __init__(
        self,
        layer: MoeLayer,
        batch: _Batch,
        n_experts: int,
        reader: OutputReader | None,
        residual: Residual | None,
        mass: Mass | None,
    ) -> None:
        self.mass = mass
        self.layer = layer
        self.batch = batch
        self.n_experts = n_experts
        self.reader = reader
        self.residual = residual
        self.capture = capture(layer, self, outputs=reader is not None)
        self.seen: list[_Seen] = []
        self.handles: Sequence[RemovableHandle] = []

    def attach(self) -> None:
        probability = None if self.mass is None else self.mass.probability
        for part in (self.capture, self.residual, probability):
            if part is not None:
                self.handles = [*self.handles, *part.attach()]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen = [], []
        if self.reader is not None:
            self.reader.sums = None  # hooks and listeners hold each other until the next collection

    def routing(self, ids: Tensor, weights: Tensor) -> None:
        self.seen.append(_Seen(ids, weights))

    def outputs(self, rows: Tensor, places: Tensor) -> None:
        if self.reader is None:
            return
        seen = self.seen[-1]
        if seen.readings is None:
            seen.readings = Readings.zeros(seen.ids.numel())
            seen.site, seen.counted = self._sites(seen)
        places = places.to(seen.counted.device)  # experts may run elsewhere than their router
        which = seen.counted[places].nonzero()[:, 0]
        sites, at = seen.site[places[which]].to(rows.device), places[which].cpu()
        found = self.reader.read(rows, which.to(rows.device), sites)
        seen.readings.norm[at], seen.readings.peak[at] = found.norm, found.peak
        seen.readings.channel[at] = found.channel

    def _sites(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """Site of each slot, and whether it counts, (n_positions · top_k,)."""
        batch, counted = self.batch, self._used(seen)
        site = torch.where(counted, seen.ids, 0).long()
        if batch.real is not None:
            counted = counted & batch.real.to(counted.device)[:, None]
        if batch.domain is not None:
            site = site + batch.domain.to(site.device)[:, None] * self.n_experts
        return site.reshape(-1), counted.reshape(-1)

    def total(self, routed: Tensor) -> None:
        if self.residual is not None:
            self.seen[-1].shift = self.residual.turned(routed)

    def _used(self, seen: _Seen) -> Tensor:
        # Ids past the experts mean "none" or an identity, and a zero weight uses nothing.
        return (seen.ids < self.layer.n_experts) & (seen.weights != 0)

    def take(self, real: Tensor) -> Routing:
        seen, self.seen = self.seen, []
        if len(seen) != 1 or len(seen[0].ids) != len(real):
            rows = sum(len(one.ids) for one in seen)
            raise DataError(
                f"layer {self.layer.layer} saw {rows} rows in {len(seen)} calls for {len(real)} "
                "positions; this model does not run all tokens through its experts at once"
            )
        if self.mass is not None:
            self.mass.add(seen[0].ids, seen[0].weights, real, self.batch.domain)
        return self._routing(seen[0], real)

    def _routing(self, seen: _Seen, real: Tensor) -> Routing:
        chosen = real.to(seen.ids.device)
        ids, weights, used = seen.ids[chosen], seen.weights[chosen], self._used(seen)[chosen]
        self._check(weights, "routing weights")
        parts = self._parts(seen, real, used.cpu())
        weights = weights * used
        if bool((weights[:, 1:] > weights[:, :-1]).any()):
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            ids, used = ids.gather(1, order), used.gather(1, order)
            parts = [part.gather(1, order.cpu()) for part in parts]
        expert = (ids * used).cpu().numpy().astype(np.uint16)
        names = ("norm", "peak", "channel")[: len(parts)]
        columns = {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        shift = None if seen.shift is None else seen.shift[chosen].cpu().numpy()
        sums = None if self.reader is None else self.reader.sums
        found = Routing(expert, weights.cpu().numpy(), **columns, shift=shift, sums=sums)
        if self.mass is None:
            return found
        return replace(found, mass=self.mass.sums, next=self.mass.next)

    def _parts(self, seen: _Seen, real: Tensor, used: Tensor) -> list[Tensor]:
        """Norms, peaks and channels of real tokens."""
        if seen.readings is None:
            return []
        found, chosen = seen.readings, real.cpu()
        parts = [found.norm, found.peak, found.channel]
        norm, peak, channel = (part.reshape(seen.ids.shape)[chosen] for part in parts)
        self._check(norm[used], "expert outputs")
        return [norm * used, peak * used, channel * used]

    def _check(self, values: Tensor, what: str) -> None:
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{what} of layer {self.layer.layer} are not finite; the weights are damaged or "
                "overflow in this dtype: check the checkpoint or use float32"
            )
