"""The squared-error engine through its boundary, against scikit-learn, scipy and slow twins."""

import numpy as np
import pytest

from moecollab import _core
from planted import as_rows, planted
from real_routing import load_routing, routing_folder

ENCODE = {
    "sparsity": 0.2,
    "reconstruction": 1.0,
    "tolerance": 1e-4,
    "caps": None,
    "gap": False,
    "threads": 1,
}
LEARN = {
    "batches": 1,
    "batch": 64,
    "window": 200,
    "exponent": 3.0,
    "share": 0.5,
    "sparsity": 0.2,
    "reconstruction": 1.0,
    "tolerance": 1e-3,
    "seed": 0,
    "threads": 1,
}
FIT = {
    "atoms": [30, 40],
    "copies": False,
    "dictionary_size": 1.0,
    "sparsity": 1.0,
    "reconstruction": 300.0,
    "passes": 3.0,
    "batch": 0,
    "max_iterations": 100,
    "tolerance": 1e-3,
    "seed": 0,
    "threads": 1,
}


def arrays(x):
    rows = as_rows(x)
    return rows.indptr, rows.sites, rows.values


def unit(atoms):
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)


def encode(x, atoms, **changes):
    return _core.encode_square(arrays(x), x.shape[1], atoms, ENCODE | changes)


def dense(found, n_atoms):
    indptr = found["indptr"]
    codes = np.zeros((len(indptr) - 1, n_atoms), np.float64)
    codes[np.repeat(np.arange(len(codes)), np.diff(indptr)), found["atom"]] = found["value"]
    return codes


def cost(x, codes, atoms, penalty):
    """Each row's penalty times the sum of its codes plus half its squared error."""
    rest = x.astype(np.float64) - codes @ atoms.astype(np.float64)
    return penalty * codes.sum(axis=1) + 0.5 * (rest**2).sum(axis=1)


def learn(x, state, **changes):
    return _core.learn_square(arrays(x), x.shape[1], state, LEARN | changes)


def fit(x, watch=lambda row: None, **changes):
    return _core.fit_square(arrays(x), x.shape[1], FIT | changes, watch)


def start(x, n_atoms):
    return {"atoms": np.ascontiguousarray(unit(x[:n_atoms]), np.float32)}


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0], ids=lambda density: f"atoms {density}")
@pytest.mark.parametrize("filled", [0.08, 0.6], ids=lambda filled: f"rows {filled}")
def test_codes_agree_with_scikit_learn(density, filled):
    sparse_encode = pytest.importorskip("sklearn.decomposition").sparse_encode
    rng = np.random.default_rng(0)
    x = (rng.random((150, 90)) * (rng.random((150, 90)) < filled)).astype(np.float32)
    atoms = rng.random((70, 90)) * (rng.random((70, 90)) < density)
    atoms = np.ascontiguousarray(unit(atoms + 1e-9 * (density == 1.0)), np.float32)
    # scikit-learn minimises ½|x − rD|² + alpha |r|₁ too, so alpha is λ₁/λ₂.
    theirs = sparse_encode(
        x.astype(np.float64),
        atoms.astype(np.float64),
        algorithm="lasso_cd",
        alpha=0.2,
        positive=True,
    )
    ours = encode(x, atoms, gap=True)
    best = cost(x, theirs, atoms, 0.2).mean()
    assert cost(x, dense(ours, 70), atoms, 0.2).mean() <= best * (1 + 1e-5)
    assert ours["gap"].min() >= -1e-6
    assert ours["gap"].mean() < 1e-3 * best


def test_a_cut_run_gives_the_same_bytes():
    x, _ = planted(n_rows=200, noise=0.02)
    whole = learn(x, start(x, 24), batches=20, threads=2)
    state = start(x, 24)
    for batches in (3, 1, 16):
        state = learn(x, state, batches=batches)
    for name in set(whole) - {"running"}:
        assert whole[name].tobytes() == state[name].tobytes(), name


def test_learning_piece_by_piece_finds_groups():
    x, groups = planted(n_rows=3000, n_groups=24)
    state = start(x, 40)
    for piece in np.array_split(x, 5):
        state = learn(piece, state, batches=len(piece) // 64 + 1, window=1500)
    best = (unit(groups) @ unit(state["atoms"]).T).max(axis=1)
    assert (best > 0.95).mean() > 0.9
    assert np.linalg.norm(state["atoms"], axis=1).max() <= 1 + 1e-5
    assert state["atoms"].min() >= 0


def test_the_fit_descends_and_adds_up():
    x, groups = planted(n_rows=600, noise=0.01)
    told = []
    found = fit(x, told.append)
    assert found["stop_reason"] == "tolerance"
    assert told == found["history"][:-1]
    by_stage = {}
    for row in told:
        by_stage.setdefault(row["stage"], []).append(row["total"])
    assert list(by_stage) == ["learn 1", "level 1", "level 2"]
    for stage in ("level 1", "level 2"):
        assert (np.diff(by_stage[stage]) <= 1e-6 * by_stage[stage][0]).all()
    level = found["levels"][0]
    codes = dense(level, 30)
    rows = cost(x, codes, level["atoms"], 1.0 / 300.0).mean()
    by_hand = codes.max(axis=0).sum() + 300.0 * rows
    assert by_stage["level 1"][-1] == pytest.approx(by_hand, rel=1e-5)
    assert level["peak"] == pytest.approx(codes.max(axis=0))
    assert level["usage"] == pytest.approx(codes.sum(axis=0))
    below = found["levels"][1]
    assert below["usage"] == pytest.approx(level["usage"] @ dense(below, 40), rel=1e-4)
    best = (unit(groups) @ unit(level["atoms"]).T).max(axis=1)
    assert (best > 0.95).mean() > 0.9


def test_the_fit_ends_at_ctrl_c_with_the_best_so_far():
    x, _ = planted(n_rows=100)

    def watch(row):
        raise KeyboardInterrupt

    found = fit(x, watch)
    assert found["stop_reason"] == "interrupted"
    assert found["levels"][0]["atoms"].any()

    def fail(row):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(x, fail)


def test_dictionary_size_switches_atoms_off():
    x, _ = planted(n_rows=400, n_groups=8)
    cheap = fit(x, atoms=[40], dictionary_size=0.0)["levels"][0]["peak"]
    dear = fit(x, atoms=[40], dictionary_size=3.0)["levels"][0]["peak"]
    assert (dear > 0).sum() < (cheap > 0).sum()
    assert (dear > 0).sum() >= 8


def test_real_routing_is_explained_better_than_by_the_mean():
    x = load_routing(routing_folder(), 1500).dense()
    found = fit(x, atoms=[48], dictionary_size=0.0, sparsity=15.0)
    assert found["stop_reason"] == "tolerance"
    error = 2 * found["history"][-1]["reconstruction"]
    assert error < ((x - x.mean(axis=0)) ** 2).sum(axis=1).mean()
