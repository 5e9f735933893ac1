"""All criteria that run no model, on what a recording of 58 layers × 256 experts holds.

    pytest benches/bench_criteria.py --benchmark-enable
    python benches/bench_criteria.py [--tokens 8192] [--width 7168]

The second prints the CPU seconds of each and their sum (set OPENBLAS_NUM_THREADS=1). Sums are drawn
at random, in the shapes of a recording of DeepSeek-R1; criteria that read single tokens get as many
as asked for.
"""

import argparse
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from moecollab import criteria
from moecollab.criteria.base import Evidence, Needs
from moecollab.record.activations import LayerTable
from moecollab.record.rows import Rows
from moecollab.record.sketch import add_tokens
from moecollab.record.sums import REGISTERS, SUMS
from moecollab.record.tallies import Tallies

N_LAYERS, N_EXPERTS, TOP_K, N_DOMAINS = 58, 256, 8, 4
NAMES = [
    name
    for name in criteria.names()
    if not criteria.get(name).needs & (Needs.MODEL | Needs.WEIGHTS)
]


class Tokens:
    """What the criteria of single tokens ask of a recording: every layer alike."""

    layers, n_experts = tuple(range(N_LAYERS)), N_EXPERTS
    n_sites = N_LAYERS * N_EXPERTS

    def __init__(self, n_tokens: int) -> None:
        rng = np.random.default_rng(0)
        taste = rng.normal(size=N_EXPERTS)
        logits = taste + rng.gumbel(size=(n_tokens, N_EXPERTS))
        ballot = np.argsort(-logits, axis=1)[:, : 3 * TOP_K].astype(np.uint16)
        weight = np.full((n_tokens, TOP_K), 1 / TOP_K, np.float32)
        self.table = LayerTable(ballot[:, :TOP_K], weight, None, ballot[:, TOP_K:])
        first = np.arange(N_LAYERS)[:, None] * N_EXPERTS
        sites = np.sort(ballot[:, None, :TOP_K] + first, axis=2).astype(np.uint32)
        pointers = np.arange(n_tokens + 1) * (N_LAYERS * TOP_K)
        values = rng.random(sites.size).astype(np.float32)
        self._rows = Rows(
            pointers, sites.ravel(), values, np.arange(n_tokens, dtype=np.uint32), self.n_sites
        )

    def layer(self, _layer: int) -> LayerTable:
        """The same table for each."""
        return self.table

    def rows(self, _grain: str, _weights: str) -> Rows:
        """All layers of the tokens."""
        return self._rows

    def token_blocks(self, _weights: str) -> Iterator[Rows]:
        """The same in one block."""
        return iter([self._rows])


def make_evidence(width: int, n_tokens: int) -> Evidence:
    """Sums of a recording, and patterns of two levels."""
    by_domain = Tallies(
        tuple("abcd"), {name: sums(name, N_DOMAINS) for name in SUMS if not SUMS[name].axis}
    )
    arrays = dict(by_domain.total().arrays)
    arrays |= {name: sums(name, width=width)[0] for name in SUMS if SUMS[name].axis}
    rng = np.random.default_rng(0)
    levels = [
        SimpleNamespace(
            atoms=(rng.random((size, N_LAYERS * N_EXPERTS)) ** 30).astype(np.float32),
            usage=rng.random(size),
            peak=np.ones(size),
        )
        for size in (512, 2048)
    ]
    return Evidence(
        tallies=Tallies((), arrays),
        by_domain=by_domain,
        top_k=TOP_K,
        activations=Tokens(n_tokens),
        collaboration=SimpleNamespace(
            levels=levels,
            n_sites=Tokens.n_sites,
            settings={"rows": "token", "weights": "raw"},
        ),
    )


def sums(name: str, n_domains: int = 1, width: int = 1) -> np.ndarray:
    """Random numbers in the shape of a sum; layers after the first repeat it."""
    rng = np.random.default_rng(1)
    last = {"": (), "width": (width,), "experts": (N_EXPERTS,), "registers": ()}[SUMS[name].axis]
    if name == "token_sketch":
        one = np.zeros((N_EXPERTS, REGISTERS), np.uint8)
        site = rng.integers(0, N_EXPERTS, 65_536)
        add_tokens(one, site, rng.integers(0, 30_000, site.size))
    elif SUMS[name].dtype == "int64":
        one = rng.integers(1, 10_000, (N_EXPERTS, *last))
    else:
        one = rng.random((N_EXPERTS, *last)) * 1e4
    return np.tile(one, (n_domains, N_LAYERS, *(1,) * one.ndim))


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence(width=64, n_tokens=512)


@pytest.mark.parametrize("name", NAMES)
def test_criterion(benchmark, name, evidence):
    found = benchmark(criteria.get(name).function, evidence)
    assert found.shape == (N_LAYERS, N_EXPERTS)
    assert np.isfinite(found).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--width", type=int, default=7_168)
    given = parser.parse_args()
    evidence = make_evidence(given.width, given.tokens)
    taken = {}
    for name in NAMES:
        start = time.process_time()
        criteria.get(name).function(evidence)
        taken[name] = time.process_time() - start
        print(f"{name:17} {taken[name]:7.3f} s", flush=True)
    print(f"{len(NAMES)} criteria {sum(taken.values()):9.3f} s")


if __name__ == "__main__":
    main()
