"""Small problems against SciPy's solvers, and gradients against finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, lsq_linear, minimize

from adam_twin import AdamTwin
from moecollab.patterns.dictionary import HSDL
from planted import as_rows, dense_codes, planted
from test_square import cost, dense, encode, fit, learn, start, unit


def least_error(column, codes):
    """The least of |x - R d|₁ over d in [0, 1], for one expert, by HiGHS."""
    n_rows, n_atoms = codes.shape
    price = np.concatenate([np.zeros(n_atoms), np.ones(n_rows)])
    slack = np.eye(n_rows)
    above = np.block([[codes, -slack], [-codes, -slack]])
    limits = [(0, 1)] * n_atoms + [(0, None)] * n_rows
    return linprog(price, above, np.concatenate([column, -column]), bounds=limits).fun


@pytest.mark.parametrize("seed", range(3))
def test_the_dictionary_of_absolute_error_is_close_to_its_linear_program(seed):
    """Single entries settle where no other one entry helps: near the best of all, never below."""
    x, _ = planted(n_rows=60, n_layers=3, n_experts=4, n_groups=6, noise=0.02, seed=seed)
    settings = {"sparsity": 0.1, "reconstruction": 100.0, "tolerance": 0.0, "threads": 1}
    found = HSDL(atoms=(8,), **settings).fit(as_rows(x))
    codes, x = dense_codes(found.codes, 8).astype(float), x.astype(float)
    error = np.abs(x - codes @ found.levels[0].atoms.astype(float)).sum(axis=0)
    best = np.array([least_error(column, codes) for column in x.T])
    assert (error >= best - 1e-4).all()
    assert error.sum() <= 1.02 * best.sum() + 1e-3


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([np.inf, 0.25]),
    st.sampled_from([0.0, 0.3]),
)
def test_codes_of_squared_error_solve_their_quadratic_program(seed, n_atoms, cap, penalty):
    """p Σr + ½|x - D'r|² = ½|Lr - L⁻¹(Dx - p)|² + a constant, with DD' = L'L."""
    rng = np.random.default_rng(seed)
    x, atoms = rng.random((3, 8)).astype(np.float32), rng.random((n_atoms, 8)).astype(np.float32)
    found = dense(encode(x, atoms, sparsity=penalty, caps=[cap] * n_atoms), n_atoms)
    long = atoms.astype(float)
    lower = np.linalg.cholesky(long @ long.T)
    for row, codes in zip(x, found, strict=True):
        target = np.linalg.solve(lower, long @ row - penalty)
        exact = lsq_linear(lower.T, target, (0, cap)).x
        best = cost(row[None], exact[None], atoms, penalty)[0]
        assert cost(row[None], codes[None], atoms, penalty)[0] <= best + 1e-4 * (1 + best)
        assert codes.max(initial=0) <= cap


@pytest.mark.parametrize("seed", range(3))
def test_the_dictionary_of_squared_error_solves_its_quadratic_program(seed):
    """Given the codes, no atoms >= 0 of norm at most 1 fit better."""
    x, _ = planted(n_rows=50, n_layers=2, n_experts=4, n_groups=4, noise=0.1, seed=seed)
    level = fit(x, atoms=[4], sparsity=5.0, tolerance=0.0, max_iterations=500)["levels"][0]
    codes, atoms = dense(level, 4), level["atoms"].astype(float)

    def error(flat):
        rest = codes @ flat.reshape(atoms.shape) - x
        return 0.5 * (rest**2).sum(), (codes.T @ rest).ravel()

    room = {
        "type": "ineq",
        "fun": lambda flat: 1 - (flat.reshape(atoms.shape) ** 2).sum(axis=1),
    }
    best = minimize(
        error, atoms.ravel() * 0.9, jac=True, bounds=[(0, None)] * atoms.size, constraints=room,
        method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    assert best.success
    assert np.linalg.norm(atoms, axis=1).max() <= 1 + 1e-5
    assert best.fun * (1 - 1e-4) <= error(atoms.ravel())[0] <= best.fun * (1 + 1e-3)


def differences(function, at, step):
    """Central differences of a function of one array."""
    out = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        shift = np.zeros(at.shape)
        shift[place] = step
        out[place] = (function(at + shift) - function(at - shift)) / (2 * step)
    return out


def test_the_sums_of_a_batch_are_the_gradient_of_its_error():
    """One batch of all rows: pull is minus the slope of ½|X - R D|² in D, second its curvature."""
    x, _ = planted(n_rows=40, n_layers=2, n_experts=6, n_groups=5, noise=0.1, seed=3)
    begin = start(x, 5)
    state = learn(x, begin, batch=40, batches=1, window=40, share=0.2)
    codes = dense(encode(x, begin["atoms"], tolerance=1e-3), 5)
    weight = state["scales"][1]

    def error(atoms):
        return 0.5 * ((x - codes @ atoms) ** 2).sum()

    slope = differences(error, state["atoms"].astype(float), 1e-4)
    assert state["pull"] / weight == pytest.approx(-slope, abs=2e-3)
    assert state["second"] / weight == pytest.approx(codes.T @ codes, rel=1e-4, abs=1e-4)
    assert state["first"] / weight == pytest.approx(codes.sum(axis=0), rel=1e-5)


def test_codes_of_squared_error_are_stationary():
    """The slope of each row's cost is 0 at codes in use and not negative at the others."""
    x, groups = planted(n_rows=30, n_layers=3, n_experts=4, n_groups=6, noise=0.1, seed=1)
    atoms = unit(groups).astype(np.float32)
    codes = dense(encode(x, atoms, tolerance=1e-6), 6)
    slope = differences(lambda r: cost(x, r, atoms, 0.2).sum(), codes, 1e-4)
    assert slope[codes > 0] == pytest.approx(0, abs=1e-4)
    assert slope.min() > -1e-4


def test_the_gap_bounds_the_distance_to_the_optimum():
    x, groups = planted(n_rows=30, noise=0.1, seed=1)
    atoms = unit(groups).astype(np.float32)
    best = cost(x, dense(encode(x, atoms, tolerance=1e-6), 24), atoms, 0.2)
    for tolerance in (1e-2, 0.3, 3.0):
        rough = encode(x, atoms, tolerance=tolerance, gap=True)
        above = cost(x, dense(rough, 24), atoms, 0.2) - best
        assert (rough["gap"] >= above - 1e-5).all()
    assert rough["gap"].max() > 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_of_the_adam_twin(stage):
    """The twin descends on the slopes of the objective, use held fixed as the engine does."""
    torch.manual_seed(0)
    x, _ = planted(n_rows=9, n_layers=2, n_experts=3, n_groups=3, noise=0.2, seed=1)
    twin = AdamTwin(torch.from_numpy(x.astype(np.float64)), (3, 4), 0.5, 30.0)
    for at in range(min(stage, 1) + 1):
        theta, codes = twin._start(twin.atoms[at])
        fresh = [tensor.detach().double().requires_grad_() for tensor in (theta, codes)]
        twin.levels.append(tuple(fresh))
    twin.stage = stage
    twin._loss().backward()
    checked = twin.levels[stage] if stage < 2 else (twin.levels[0][0], *twin.levels[1])
    for tensor in checked:
        kept = tensor.detach().clone()

        def loss(values, tensor=tensor):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(values))
                return twin._loss().item()

        slope = differences(loss, kept.numpy(), 1e-6)
        assert tensor.grad.numpy() == pytest.approx(slope, abs=1e-5, rel=1e-4)
        loss(kept.numpy())
