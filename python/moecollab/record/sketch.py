"""Sketches of the token ids that each expert saw: distinct ids from one KiB per expert.

HyperLogLog (Flajolet et al. 2007): each id picks one of 1,024 registers, which keeps the longest
run of leading zeros seen. Sketches of two recordings join by their maximum, without error; a count
is off by 3.3 % (one standard error), and small ones by less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.record.sums import REGISTERS

_BITS = REGISTERS.bit_length() - 1
_ALPHA = 0.7213 / (1 + 1.079 / REGISTERS)


def add_tokens(
    sketch: NDArray[np.uint8], site: NDArray[np.int64], token_id: NDArray[np.integer]
) -> None:
    """Notes that sites saw tokens.

    Parameters
    ----------
    sketch : uint8 array of shape (n_sites, 1024)
        Changed in place.
    site, token_id : int arrays of shape (n,)
        Which site saw which id.
    """
    mixed = _mixed(np.asarray(token_id).astype(np.uint64))
    register = (mixed >> np.uint64(64 - _BITS)).astype(np.int64)
    rest = (mixed << np.uint64(_BITS)) | np.uint64((1 << _BITS) - 1)
    # The exponent of a float64 is the place of its highest bit.
    rank = (64 - np.frexp(rest.astype(np.float64))[1] + 1).astype(np.uint8)
    np.maximum.at(sketch.reshape(-1), site * REGISTERS + register, rank)


def distinct(sketch: NDArray[np.uint8]) -> NDArray[np.float64]:
    """About how many different ids: float64 array, without the last axis of the sketch."""
    power = 2.0 ** -np.arange(256)
    total, empty = np.empty(sketch.shape[:-1]), np.empty(sketch.shape[:-1], np.int64)
    for at in np.ndindex(sketch.shape[:-2]):  # numbers of one layer stay in the processor's cache
        total[at] = power[sketch[at]].sum(axis=-1)
        empty[at] = (sketch[at] == 0).sum(axis=-1)
    return _estimate(total, empty)


def _estimate(total: NDArray[np.float64], empty: NDArray[np.int64]) -> NDArray[np.float64]:
    """About how many ids, from Σ 2^-register and the registers that hold nothing."""
    raw: NDArray[np.float64] = _ALPHA * REGISTERS**2 / total
    few = REGISTERS * np.log(REGISTERS / np.maximum(empty, 1))
    return np.where((raw <= 2.5 * REGISTERS) & (empty > 0), few, raw)


def shared(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """About how many ids both saw: their counts less that of the union, at least 0."""
    both = distinct(one) + distinct(other) - distinct(np.maximum(one, other))
    return np.maximum(both, 0)


def shared_by_all(sketch: NDArray[np.uint8]) -> NDArray[np.float64]:
    """About how many ids every pair saw: float64 (n, n) of sketches (n, 1024), as :func:`shared`.

    The registers of a union are the larger ones of both. Those at most v in both are counted for
    all pairs by one product of matrices, so nothing is made for each pair; registers that are at
    most v for all, or for none, are counted once.
    """
    top, n = int(sketch.max(initial=0)), len(sketch)
    lowest, highest = sketch.min(axis=0, initial=255), sketch.max(axis=0, initial=0)
    registers = np.ascontiguousarray(sketch.T)
    total: NDArray[np.float64] = np.full((n, n), REGISTERS * 2.0**-top)
    empty = np.full((n, n), REGISTERS if top == 0 else 0)
    for level in range(top):
        least = (registers[(lowest <= level) & (level < highest)] <= level).astype(np.float32)
        # Registers of the union that are at most this: whole numbers, exact in float32.
        here = least.T @ least + np.float32((highest <= level).sum())
        total += here * np.float32(2.0 ** -(level + 1))  # Σ 2^-register, added up by parts
        if level == 0:
            empty = here.astype(np.int64)
    union = _estimate(total, empty)
    one = union.diagonal()
    return np.maximum(one[:, None] + one[None, :] - union, 0)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well-mixed bits of a number (splitmix64)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
