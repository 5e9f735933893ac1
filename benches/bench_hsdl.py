"""HSDL on planted rows, beside the Adam twin of the same objective."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from adam_twin import AdamTwin
from moecollab.patterns.dictionary import HSDL
from planted import as_rows, planted

SIZES = [(1_000, 8), (10_000, 8), (10_000, 64)]


@pytest.mark.parametrize(("n_rows", "n_experts"), SIZES, ids=lambda size: str(size))
def test_fit(benchmark, n_rows, n_experts):
    x, _ = planted(n_rows=n_rows, n_layers=4, n_experts=n_experts, noise=0.01)
    rows, hsdl = as_rows(x), HSDL(atoms=(32, 64), sparsity=0.1)
    found = benchmark.pedantic(hsdl.fit, (rows,), rounds=3, iterations=1)
    assert found.converged
    assert found.history[-1]["total"] > 0


def test_fit_beside_adam(benchmark):
    x, _ = planted(n_rows=1_000, n_layers=4, n_experts=8, noise=0.01)
    twin = AdamTwin(torch.from_numpy(x), (32, 64), 0.1, 100.0, epochs=50)
    found = benchmark.pedantic(twin.fit, rounds=1, iterations=1)
    assert found > 0
