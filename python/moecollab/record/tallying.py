"""Adding up what one shard recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.record.recorder import Routing
from moecollab.record.sketch import add_tokens
from moecollab.record.sums import REGISTERS, add
from moecollab.record.tallies import Tallies
from moecollab.record.windows import Sample

_PAIR_ROWS = 8192


@dataclass(frozen=True)
class Tokens:
    """The tokens of a shard, (n_tokens,) each.

    Parameters
    ----------
    domain : int64 array
        Position of each token's domain among the names.
    token_id, position : int arrays
        Vocabulary id, and place in the sample.
    """

    domain: NDArray[np.int64]
    token_id: NDArray[np.integer]
    position: NDArray[np.integer]

    @classmethod
    def of(cls, samples: Sequence[Sample], domains: Sequence[str]) -> Tokens:
        """The tokens of some samples, in order."""
        counts = [len(sample.ids) for sample in samples]
        number = np.array([domains.index(sample.document.domain) for sample in samples])
        places = [
            np.arange(len(sample.ids)) if sample.positions is None else sample.positions
            for sample in samples
        ]
        ids = np.concatenate([sample.ids for sample in samples])
        return cls(np.repeat(number, counts), ids, np.concatenate(places))


def tally(
    domains: Sequence[str],
    tokens: Tokens,
    layers: Sequence[Routing],
    n_experts: int,
    groups: Sequence[str] = ("routing", "norms"),
    total: Tallies | None = None,
) -> Tallies:
    """Sums over some tokens, added in the order of the tokens.

    Parameters
    ----------
    domains : sequence of str
        Names of all domains.
    tokens : Tokens
        The tokens.
    layers : sequence of Routing
        What each MoE layer did to these tokens.
    n_experts : int
        Routed experts per layer.
    groups : sequence of str
        What to sum, as in :data:`moecollab.record.sums.GROUPS`; all must have been recorded.
    total : Tallies, optional
        Sums of earlier tokens of the same domains and groups: these are added in their place.
    """
    if total is None:
        width = 0
        if "channels" in groups:
            width = next(one.sums.shape[-1] for one in layers if one.sums is not None)
        total = Tallies.zeros(domains, len(layers), n_experts, groups=groups, width=width)
    for row, routing in enumerate(layers):
        into = {name: value[:, row] for name, value in total.arrays.items()}
        found = _sums(tokens, routing, len(domains), n_experts, groups)
        add(into, {name: value.reshape(into[name].shape) for name, value in found})
    return total


def _sums(
    tokens: Tokens, routing: Routing, n_domains: int, n_experts: int, groups: Sequence[str]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and values, over domains × experts first, of the sums of one layer."""
    size = n_domains * n_experts
    used = routing.weight != 0
    sites = tokens.domain[:, None] * n_experts + routing.expert  # (n_tokens, top_k)
    site = sites[used]
    yield "count", np.bincount(site, minlength=size)
    for name, values in _values(routing, used, groups):
        yield name, np.bincount(site, values, size)
    if routing.peak is not None and routing.channel is not None:
        yield from _peaks(tokens, routing, used, site, size)
    if "pairs" in groups:
        yield "pair_count", _pairs(sites, used, n_experts, size)
    if "vocabulary" in groups:
        sketch = np.zeros((size, REGISTERS), np.uint8)
        add_tokens(sketch, site, np.broadcast_to(tokens.token_id[:, None], used.shape)[used])
        yield "token_sketch", sketch
    if "probability" in groups and routing.mass is not None:
        yield "sum_probability", routing.mass
    if "channels" in groups and routing.sums is not None:
        yield "sum_output", routing.sums[:, 0]
        yield "sum_output_sq", routing.sums[:, 1]


def _values(
    routing: Routing, used: NDArray[np.bool_], groups: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """What each used slot adds to a sum."""
    weight = routing.weight[used].astype(np.float64)
    yield "sum_weight", weight
    yield "sum_weight_sq", weight * weight
    if routing.norm is None:
        return
    norm = routing.norm[used].astype(np.float64)
    yield "sum_norm", norm
    yield "sum_norm_sq", norm * norm
    yield "sum_weighted_norm", weight * norm
    yield "sum_weighted_norm_sq", (weight * norm) ** 2
    if "shift" in groups and routing.shift is not None:
        shift = np.broadcast_to(routing.shift[:, None], used.shape)[used]
        yield "sum_shift", weight * norm * shift


def _peaks(
    tokens: Tokens,
    routing: Routing,
    used: NDArray[np.bool_],
    site: NDArray[np.int64],
    size: int,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The largest entry of each site, and the first token and channel that have it."""
    if routing.peak is None or routing.channel is None:
        return
    peak = routing.peak[used].astype(np.float64)
    highest = np.zeros(size)
    np.maximum.at(highest, site, peak)
    yield "max_abs", highest
    which = np.flatnonzero(peak == highest[site])
    names, first = np.unique(site[which], return_index=True)
    token = np.nonzero(used)[0][which[first]]
    found = {
        "peak_token": tokens.token_id[token],
        "peak_position": tokens.position[token],
        "peak_channel": routing.channel[used][which[first]],
    }
    for name, values in found.items():
        column = np.zeros(size, np.int64)
        column[names] = values
        yield name, column


def _pairs(
    sites: NDArray[np.int64], used: NDArray[np.bool_], n_experts: int, size: int
) -> NDArray[np.int64]:
    """How often two experts serve one token, (size, n_experts); its diagonal is the count."""
    pairs = np.zeros(size * n_experts, np.int64)
    for start in range(0, len(sites), _PAIR_ROWS):
        site, on = sites[start : start + _PAIR_ROWS], used[start : start + _PAIR_ROWS]
        both = on[:, :, None] & on[:, None, :]
        key = site[:, :, None] * n_experts + site[:, None, :] % n_experts
        pairs += np.bincount(key[both], minlength=len(pairs))
    return pairs
