"""Squared-error coding and learning beside SPAMS and scikit-learn: one thread, CPU seconds.

    python benches/peers_square.py coding --atoms 128
    python benches/peers_square.py fit --atoms 128 --seeds 3 --peers ours,spams
    python benches/peers_square.py coding --data FILE.npz      # arrays X and D

Every method runs in a process of its own, from the same start and the same order of rows, and is
judged by the same accurate coder in float64. Dictionaries are snapshotted with the CPU seconds
spent so far; SPAMS and ours are run afresh for each snapshot, and timed whole. Prints Markdown
and, with --out, writes it.

The OpenBLAS inside the SPAMS wheel may not know a new processor and then falls back to its oldest
kernel; it is told what NumPy's own OpenBLAS has found, so that SPAMS runs at its best.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from routing_data import routing

PENALTY = 0.5
ROUNDS = 4
BUDGET = {"ours": 4.0, "scikit-learn": 60.0}
SPAMS_BUDGET = 12.0
METHODS = ("ours", "ours-64", "spams-256", "spams-128", "spams-64", "scikit-learn")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def load(options):
    """Rows and planted atoms, from a file or made."""
    if options.data:
        with np.load(options.data) as data:
            return data["X"], data["D"]
    return routing(options.rows, n_atoms=options.atoms)


def unit(atoms):
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)


def sparse(x):
    row, site = np.nonzero(x)
    indptr = np.concatenate(([0], np.cumsum((x > 0).sum(axis=1)))).astype(np.int64)
    return indptr, site.astype(np.uint32), np.ascontiguousarray(x[row, site], np.float32)


def encode(rows, atoms, tolerance):
    from moecollab._core import encode_square

    settings = {"sparsity": PENALTY, "reconstruction": 1.0, "caps": None, "gap": False}
    settings |= {"tolerance": tolerance, "threads": 1}
    return encode_square(rows, atoms.shape[1], np.ascontiguousarray(atoms, np.float32), settings)


def dense(found, n_atoms):
    codes = np.zeros((len(found["indptr"]) - 1, n_atoms), np.float32)
    codes[np.repeat(np.arange(len(codes)), np.diff(found["indptr"])), found["atom"]] = found[
        "value"
    ]
    return codes


def objective(x, codes, atoms):
    """Mean over rows of half the squared error plus the penalty."""
    total = 0.0
    for at in range(0, len(x), 1000):
        part = codes[at : at + 1000].astype(np.float64)
        rest = x[at : at + 1000] - part @ atoms.astype(np.float64)
        total += 0.5 * (rest * rest).sum() + PENALTY * part.sum()
    return total / len(x)


def found_share(atoms, planted):
    """Share of planted atoms that have an atom of their own with a cosine above 0.9."""
    from scipy.optimize import linear_sum_assignment

    cosines = unit(planted) @ unit(atoms).T
    pairs = linear_sum_assignment(-cosines)
    return float((cosines[pairs] > 0.9).mean())


# --- coding ---------------------------------------------------------------------------------


def coders(x, atoms):
    """Name → (function of nothing that codes some rows, number of rows)."""
    some = min(4000, len(x))
    few = min(2000, len(x))
    x64, atoms64 = x[:few].astype(np.float64), atoms.astype(np.float64)

    def spams_lasso():
        import spams

        rows, columns = np.asfortranarray(x[:some].T), np.asfortranarray(atoms.T)
        found = spams.lasso(
            rows, D=columns, lambda1=PENALTY, lambda2=0.0, mode=2, pos=True, numThreads=1
        )
        return found.T

    def lasso_cd():
        from sklearn.decomposition import sparse_encode

        return sparse_encode(x64, atoms64, algorithm="lasso_cd", alpha=PENALTY, positive=True)

    rows = sparse(x)
    full = np.maximum(atoms, np.float32(1e-9))
    return {
        "ours": (lambda: encode(rows, atoms, 1e-4), len(x)),
        "ours, no zero in the atoms": (lambda: encode(rows, full, 1e-4), len(x)),
        "SPAMS lasso, float32": (spams_lasso, some),
        "scikit-learn lasso_cd, float64": (lasso_cd, few),
    }


def coding(options):
    x, atoms = load(options)
    atoms = np.ascontiguousarray(atoms)
    methods = coders(x, atoms)
    spent = {name: [] for name in methods}
    costs = {}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, (run, n_rows) in methods.items():
            before = time.process_time()
            codes = run()
            spent[name].append((time.process_time() - before) / n_rows * 1e6)
            costs[name] = codes
    judged = min(2000, len(x))
    for name, codes in costs.items():
        matrix = dense(codes, len(atoms)) if isinstance(codes, dict) else codes
        matrix = np.asarray(matrix.todense() if hasattr(matrix, "todense") else matrix)
        costs[name] = objective(x[:judged], matrix[:judged], atoms)
    best = min(costs.values())
    lines = [
        "| method | µs a row | rows/s | times ours | objective above best |",
        "|---|--:|--:|--:|--:|",
    ]
    medians = {name: statistics.median(times[1:]) for name, times in spent.items()}
    for name, each in medians.items():
        over, times = (costs[name] - best) / best, each / medians["ours"]
        lines.append(f"| {name} | {each:.2f} | {1e6 / each:,.0f} | {times:.1f} | {over:.1e} |")
    return [f"Coding {x.shape[0]} × {x.shape[1]}, {len(atoms)} atoms, λ {PENALTY}", "", *lines]


# --- learning -------------------------------------------------------------------------------


def afresh(run, budget, first, growth):
    """Snapshots of fresh runs of more and more work, each timed whole."""
    shots, work = [], first
    while True:
        before = time.process_time()
        atoms = run(round(work))
        shots.append((time.process_time() - before, atoms))
        if shots[-1][0] > budget / 2:
            return shots
        work *= growth


def learn_ours(x, start, budget, batch):
    from moecollab._core import learn_square

    rows = sparse(x)
    n_atoms = len(start)
    batch = batch or max(1, round(0.75 * n_atoms / 48)) * 48
    settings = {"batch": batch, "window": 2 * len(x), "exponent": 3.0, "share": 0.5}
    settings |= {"sparsity": PENALTY, "reconstruction": 1.0, "tolerance": 1e-3}
    settings |= {"seed": 0, "threads": 1}

    def run(batches):
        state = {"atoms": start}
        return learn_square(rows, x.shape[1], state, settings | {"batches": batches})["atoms"]

    return afresh(run, budget, 2048 / batch, 1.3)


def learn_spams(x, start, budget, batch):
    import spams

    rows, columns = np.asfortranarray(x.T), np.asfortranarray(start.T)
    fixed = {"lambda1": PENALTY, "mode": 2, "posAlpha": True, "posD": True, "verbose": False}
    fixed |= {"K": len(start), "batchsize": batch, "numThreads": 1}
    return afresh(lambda n: spams.trainDL(rows, D=columns, iter=n, **fixed).T, budget, 20, 1.5)


class _Enough(Exception):
    pass


def learn_sklearn(x, start, budget):
    from sklearn.decomposition import MiniBatchDictionaryLearning

    shots, clock = [], {"spent": 0.0, "next": 0.0, "since": 0.0}

    def callback(scope):
        clock["spent"] += time.process_time() - clock["since"]
        if clock["spent"] >= clock["next"]:
            shots.append((clock["spent"], np.array(scope["dictionary"], np.float32)))
            clock["next"] = max(0.1, clock["spent"] * 1.2)
        if clock["spent"] > budget:
            raise _Enough
        clock["since"] = time.process_time()

    model = MiniBatchDictionaryLearning(
        len(start),
        alpha=PENALTY,
        fit_algorithm="cd",
        positive_code=True,
        positive_dict=True,
        dict_init=start.astype(np.float64),
        batch_size=256,
        max_iter=1000,
        tol=0,
        max_no_improvement=None,
        random_state=0,
        callback=callback,
    )
    clock["since"] = time.process_time()
    with contextlib.suppress(_Enough):
        model.fit(x.astype(np.float64))
    return shots


def child(options):
    """One method on one seed, in this process; snapshots into a file."""
    warnings.filterwarnings("ignore")
    x, planted = load(options)
    if options.seed:
        x = x[np.random.default_rng(options.seed).permutation(len(x))]
    draw = np.random.default_rng(options.seed + 1).choice(len(x), len(planted), replace=False)
    start = np.ascontiguousarray(unit(x[draw]))
    method, _, batch = options.child.partition("-")
    if method == "ours":
        shots = learn_ours(x, start, BUDGET["ours"], int(batch or 0))
    elif method == "spams":
        shots = learn_spams(x, start, SPAMS_BUDGET, int(batch))
    else:
        shots = learn_sklearn(x, start, BUDGET["scikit-learn"])
    seconds, atoms = zip(*shots, strict=True)
    np.savez(options.shots, seconds=seconds, atoms=np.stack(atoms))


def environment():
    """One thread, and the kernels that NumPy's OpenBLAS chose for this processor."""
    settings = os.environ | ENVIRONMENT
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return settings
    kinds = {info.get("architecture") for info in threadpool_info()} - {None, "Prescott"}
    return settings | ({"OPENBLAS_CORETYPE": sorted(kinds)[0]} if len(kinds) == 1 else {})


def trajectory(options, method, seed, x, planted):
    """(CPU seconds, objective, share of planted atoms found) of every snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        shots = Path(folder) / "shots.npz"
        command = [sys.executable, __file__, "child", "--child", method, "--seed", str(seed)]
        command += ["--shots", str(shots), "--atoms", str(options.atoms)]
        command += ["--rows", str(options.rows)]
        command += ["--data", options.data] if options.data else []
        subprocess.run(command, check=True, env=environment())
        with np.load(shots) as data:
            seconds, dictionaries = data["seconds"], data["atoms"]
    rows, points = sparse(x), []
    for spent, atoms in zip(seconds, dictionaries, strict=True):
        codes = dense(encode(rows, atoms, 1e-5), len(atoms))
        points.append((float(spent), objective(x, codes, atoms), found_share(atoms, planted)))
    return points


def until(points, level):
    """CPU seconds of the first snapshot at or below a level."""
    return next((spent for spent, cost, _ in points if cost <= level * (1 + 1e-6)), None)


def compare(runs, names):
    """Table lines: when ours reaches what a peer reaches early, midway and at its end."""
    lines = ["| peer | seed | level | peer, s | ours, s | times |", "|---|--:|--:|--:|--:|--:|"]
    for (method, seed), points in runs.items():
        if method in names or not points:
            continue
        best = min(cost for _, cost, _ in points)
        for level in (best * 1.03, best * 1.01, best * 1.003, best):
            theirs = until(points, level)
            ours = [until(runs[name, seed], level) for name in names if (name, seed) in runs]
            ours = min((spent for spent in ours if spent is not None), default=None)
            ratio = f"{theirs / ours:.1f}" if ours else "–"
            shown = f"{ours:.2f}" if ours else "never"
            lines.append(f"| {method} | {seed} | {level:.3f} | {theirs:.2f} | {shown} | {ratio} |")
    return lines


def fit(options):
    x, planted = load(options)
    chosen = [m for m in METHODS if any(m.startswith(p) for p in options.peers.split(","))]
    runs = {}
    for seed in range(options.seeds):
        for method in chosen:
            if method == "scikit-learn" and seed:
                continue
            runs[method, seed] = trajectory(options, method, seed, x, planted)
            spent, cost, share = runs[method, seed][-1]
            print(f"{method} seed {seed}: {cost:.4f} after {spent:.2f} s", file=sys.stderr)
    lines = ["| method | seed | CPU s | objective | planted found |", "|---|--:|--:|--:|--:|"]
    for (method, seed), points in runs.items():
        shown = points if options.all else points[-1:]
        for spent, cost, share in shown:
            lines.append(f"| {method} | {seed} | {spent:.2f} | {cost:.4f} | {share:.3f} |")
    names = [method for method in chosen if method.startswith("ours")]
    title = f"Learning {x.shape[0]} × {x.shape[1]}, {len(planted)} atoms, λ {PENALTY}"
    return [title, "", *lines, "", *compare(runs, names[:1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("coding", "fit", "child"))
    parser.add_argument("--data", default="")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--peers", default="ours,spams,scikit-learn")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="every snapshot, not the last only")
    parser.add_argument("--child", default="")
    parser.add_argument("--shots", default="")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.what == "child":
        return child(options)
    wanted = environment()
    if any(
        os.environ.get(name) != wanted.get(name) for name in (*ENVIRONMENT, "OPENBLAS_CORETYPE")
    ):
        return subprocess.run([sys.executable, *sys.argv], check=True, env=wanted)
    text = "\n".join(coding(options) if options.what == "coding" else fit(options)) + "\n"
    print(text)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
