"""The squared-error engine beside SPAMS and scikit-learn, on small rows with planted patterns.

`peers_square.py` measures the same at full size, with time to equal objective.
"""

import numpy as np
import pytest

from moecollab import _core
from peers_square import PENALTY, coders, dense, encode, objective, sparse, unit
from routing_data import routing

N_ROWS = 600
ATOMS = [32, 128]
LEARN = {
    "batch": 48,
    "window": 2 * N_ROWS,
    "exponent": 3.0,
    "share": 0.5,
    "sparsity": PENALTY,
    "reconstruction": 1.0,
    "tolerance": 1e-3,
    "seed": 0,
    "threads": 1,
}
PEERS = {
    "ours": "moecollab",
    "ours, no zero in the atoms": "moecollab",
    "SPAMS lasso, float32": "spams",
    "scikit-learn lasso_cd, float64": "sklearn.decomposition",
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("n_atoms", ATOMS, ids=lambda n_atoms: f"{n_atoms} atoms")
def test_encode(benchmark, n_atoms, name):
    pytest.importorskip(PEERS[name], reason=f"{PEERS[name]} is not installed")
    x, atoms = routing(N_ROWS, 8, 16, n_atoms)
    run, n_rows = coders(x, atoms)[name]
    benchmark.extra_info["rows"] = n_rows
    codes = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    codes = dense(codes, n_atoms) if isinstance(codes, dict) else codes
    codes = np.asarray(codes.todense() if hasattr(codes, "todense") else codes)
    best = objective(x, dense(encode(sparse(x), atoms, 1e-5), n_atoms), atoms)
    assert objective(x[: len(codes)], codes, atoms) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("n_atoms", ATOMS, ids=lambda n_atoms: f"{n_atoms} atoms")
def test_learn(benchmark, n_atoms):
    x, _ = routing(N_ROWS, 8, 16, n_atoms)
    rows = sparse(x)
    start = {"atoms": np.ascontiguousarray(unit(x[:n_atoms]))}
    settings = LEARN | {"batches": 25}
    run = (rows, x.shape[1], start, settings)
    found = benchmark.pedantic(_core.learn_square, run, rounds=5, warmup_rounds=1)
    before, after = (encode(rows, state["atoms"], 1e-4) for state in (start, found))
    costs = [
        objective(x, dense(codes, n_atoms), state["atoms"])
        for codes, state in ((before, start), (after, found))
    ]
    assert costs[1] < costs[0]


@pytest.mark.parametrize("size", [0.0, 1.0], ids=lambda size: f"size {size}")
def test_fit(benchmark, size):
    x, _ = routing(N_ROWS, 8, 16, 32)
    settings = {
        "atoms": [32, 48],
        "copies": False,
        "dictionary_size": size,
        "sparsity": 150.0,
        "batch": 0,
    }
    settings |= {"reconstruction": 300.0, "passes": 2.0, "max_iterations": 50}
    settings |= {"tolerance": 1e-3, "seed": 0, "threads": 1}
    run = (sparse(x), x.shape[1], settings, lambda row: None)
    found = benchmark.pedantic(_core.fit_square, run, rounds=3, warmup_rounds=1)
    assert found["stop_reason"] == "tolerance"
