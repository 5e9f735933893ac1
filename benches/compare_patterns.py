"""HSDL beside simpler ways to find groups of experts: ``python compare_patterns.py``.

Writes ``docs/patterns.md`` from real routing. Needs scikit-learn, and the data folder of
``MOECOLLAB_SHARED``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from scipy.optimize import linear_sum_assignment, nnls
from sklearn.cluster import KMeans, SpectralClustering, SpectralCoclustering
from sklearn.decomposition import NMF

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import moecollab as mc
from moecollab.errors import ConvergenceWarning
from moecollab.record.rows import Rows
from real_routing import N_EXPERTS, TASKS, as_token_rows, read, routing_folder

Atoms = np.ndarray  # (n_atoms, n_sites), the largest entry of each 1


def load(n_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Renormalised routing weights of tokens drawn equally from the tasks, and their task."""
    rng = np.random.default_rng(seed)
    ids, weights, domain = read(routing_folder())
    own = [np.flatnonzero(domain == number) for number in range(len(TASKS))]
    each = n_tokens // len(TASKS)
    drawn = np.concatenate([tokens[rng.choice(len(tokens), each, False)] for tokens in own])
    drawn = drawn[rng.permutation(len(drawn))]
    return as_token_rows(ids[drawn], weights[drawn], domain[drawn]).dense(), domain[drawn]


def scaled(atoms: np.ndarray) -> Atoms:
    """Atoms in use, with 1 as their largest entry."""
    top = atoms.max(axis=1)
    return (atoms[top > 0] / top[top > 0, None]).astype(np.float64)


def by_hsdl(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Level 1 of HSDL with its default weights."""
    return hsdl(x, (n_atoms,), seed)


def by_squared_hsdl(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Level 1 of HSDL under squared errors."""
    return hsdl(x, (n_atoms,), seed, "l2")


def by_fine_hsdl(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Level 2 of HSDL under a level 1 with a quarter of the atoms."""
    return hsdl(x, (n_atoms // 4, n_atoms), seed)


def hsdl(
    x: np.ndarray, atoms: tuple[int, ...], seed: int, loss: Literal["l1", "l2"] = "l1"
) -> Atoms:
    """The finest level."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = mc.HSDL(atoms=atoms, loss=loss, seed=seed, max_iterations=40).fit(Rows.of(x))
    return scaled(found.levels[-1].atoms[found.live(len(atoms))])


def by_nmf(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Non-negative matrix factorisation of least squares."""
    model = NMF(n_atoms, init="nndsvdar", random_state=seed, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x)
    return scaled(model.components_)


def by_kmeans(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Centres of k-means of the tokens."""
    return scaled(KMeans(n_atoms, n_init=1, random_state=seed).fit(x).cluster_centers_)


def by_coclusters(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Column clusters of spectral co-clustering."""
    used = np.flatnonzero(x.sum(axis=0))
    model = SpectralCoclustering(n_atoms, random_state=seed, mini_batch=False, n_init=1)
    return partition(model.fit(x[:, used]).column_labels_, used, x.shape[1])


def by_communities(x: np.ndarray, n_atoms: int, seed: int) -> Atoms:
    """Spectral communities of the graph of pairs of layers with lift above 1 at q < 0.01."""
    table = mc.mine(Rows.of(x), n_experts=N_EXPERTS, min_support=0.002).table
    table = table.filter((pl.col("q") < 0.01) & (pl.col("relation") != "same layer"))
    a, b = (
        (pl.col(f"layer_{k}").cast(pl.Int64) * N_EXPERTS + pl.col(f"expert_{k}")).alias(k)
        for k in "ab"
    )
    pairs = table.select(a, b).to_numpy()
    graph = np.zeros((x.shape[1], x.shape[1]))
    graph[pairs[:, 0], pairs[:, 1]] = table["pmi"].to_numpy()
    graph += graph.T
    used = np.flatnonzero(graph.sum(axis=0))
    model = SpectralClustering(
        n_atoms, affinity="precomputed", random_state=seed, assign_labels="cluster_qr"
    )
    return partition(model.fit(graph[np.ix_(used, used)]).labels_, used, x.shape[1])


def partition(labels: np.ndarray, used: np.ndarray, n_sites: int) -> Atoms:
    """One atom of ones per cluster."""
    atoms = np.zeros((labels.max() + 1, n_sites))
    atoms[labels, used] = 1
    return scaled(atoms)


WAYS: dict[str, Callable[[np.ndarray, int, int], Atoms]] = {
    "HSDL, level 1": by_hsdl,
    "HSDL, level 2": by_fine_hsdl,
    "HSDL of squared errors, level 1": by_squared_hsdl,
    "NMF": by_nmf,
    "k-means": by_kmeans,
    "spectral co-clustering": by_coclusters,
    "lift-graph communities": by_communities,
}


def codes(atoms: Atoms, x: np.ndarray) -> np.ndarray:
    """Non-negative least-squares codes of rows: (n_rows, n_atoms)."""
    columns = np.ascontiguousarray(atoms.T)
    return np.array([nnls(columns, row)[0] for row in x.astype(np.float64)])


def errors(atoms: Atoms, found: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Absolute errors over the entries, and squared errors over the squared entries."""
    rest = x - found @ atoms
    return float(np.abs(rest).sum() / x.sum()), float((rest**2).sum() / (x**2).sum())


def stability(one: Atoms, two: Atoms) -> float:
    """Mean cosine of atoms matched one to one."""
    unit = [atoms / np.linalg.norm(atoms, axis=1, keepdims=True) for atoms in (one, two)]
    cosine = unit[0] @ unit[1].T
    matched = linear_sum_assignment(-cosine)
    return float(cosine[matched].sum() / max(len(one), len(two)))


def information(found: np.ndarray, domain: np.ndarray, rng: np.random.Generator) -> float:
    """Bits that the largest code tells about the domain, above those of shuffled domains."""
    strongest = np.where(found.any(axis=1), found.argmax(axis=1), found.shape[1])
    shuffled = [mutual(strongest, rng.permutation(domain)) for _ in range(20)]
    return mutual(strongest, domain) - float(np.mean(shuffled))


def mutual(one: np.ndarray, two: np.ndarray) -> float:
    """Mutual information of two labellings in bits."""
    joint = np.zeros((one.max() + 1, two.max() + 1))
    np.add.at(joint, (one, two), 1 / len(one))
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / alone[seen])).sum())


def members(atoms: Atoms) -> list[list[tuple[int, int]]]:
    """(layer, expert) of entries of at least 0.5 of every atom."""
    chosen = [np.flatnonzero(atom >= 0.5) for atom in atoms]
    return [[(int(s) // N_EXPERTS, int(s) % N_EXPERTS) for s in own] for own in chosen]


def inside(atoms: Atoms, size: int, most: int = 100) -> list[list[tuple[int, int]]]:
    """Sets of so many members of the same atom, at most so many drawn from each."""
    rng, found = np.random.default_rng(0), []
    for own in members(atoms):
        draws = most if len(own) > size else int(len(own) == size)
        for _ in range(draws):
            found.append([own[at] for at in rng.choice(len(own), size, replace=False)])
    return found


def covered(sets: list[list[tuple[int, int]]], mined: mc.Mined, rows: Rows) -> tuple[float, int]:
    """Coverage at 10 % and the number of patterns of that size."""
    row = mc.coverage(sets, mined, rows, shares=(0.1,)).row(0, named=True)
    return row["coverage"], row["n_patterns"]


def measure(name: str, data: dict, n_atoms: int) -> dict[str, object]:
    """One line of the table."""
    start = time.process_time()
    atoms = WAYS[name](data["train"], n_atoms, 0)
    seconds = time.process_time() - start
    again = WAYS[name](data["train"], n_atoms, 1)
    found = codes(atoms, data["test"])
    line = {"way": name, "atoms": len(atoms)}
    line["members"] = float(np.median((atoms >= 0.5).sum(axis=1)))
    for size, mined in data["mined"].items():
        line[f"patterns of {size}"], line[f"n{size}"] = covered(members(atoms), mined, data["rows"])
        line[f"inside {size}"], _ = covered(inside(atoms, size), mined, data["rows"])
    line["absolute"], line["squared"] = errors(atoms, found, data["test"])
    line["stability"] = stability(atoms, again)
    line["information"] = information(found, data["domain"], np.random.default_rng(0))
    line["seconds"] = seconds
    print(line, flush=True)
    return line


def page(lines: list[dict[str, object]], n_tokens: int, n_test: int, n_atoms: int) -> str:
    """The table with what it shows."""
    head = (
        "| Way | atoms in use | members (median) | pairs: coverage at 10 % | triplets: coverage at "
        "10 % | pairs inside | triplets inside | held-out error, absolute | squared | stability | "
        "domain (bits) | CPU (s) |"
    )
    rows = [
        f"| {x['way']} | {x['atoms']} | {x['members']:g} | {part(x, 2)} | {part(x, 3)} | "
        f"{x['inside 2']:.2f} | {x['inside 3']:.2f} | {x['absolute']:.3f} | {x['squared']:.3f} | "
        f"{x['stability']:.2f} | {x['information']:.2f} | {x['seconds']:.0f} |"
        for x in lines
    ]
    rule = "|" + " --- |" * 12
    return TEXT.format(
        table="\n".join([head, rule, *rows]),
        n_tokens=n_tokens,
        n_test=n_test,
        n_atoms=n_atoms,
        verdict=verdict(lines),
    )


def part(line: dict[str, object], size: int) -> str:
    """Coverage with the number of patterns behind it."""
    count = line[f"n{size}"]
    return f"{line[f'patterns of {size}']:.2f} of {count}" if count else "no patterns"


def verdict(lines: list[dict[str, object]]) -> str:
    """Where HSDL is ahead of the other ways and where it is behind."""
    ours, said = lines[0], []
    measures = {
        "inside 2": ("coverage by pairs inside an atom", 1),
        "inside 3": ("coverage by triplets inside an atom", 1),
        "absolute": ("held-out error, absolute", -1),
        "squared": ("held-out error, squared", -1),
        "stability": ("stability", 1),
        "information": ("information about the domain", 1),
        "seconds": ("time", -1),
    }
    for key, (name, sign) in measures.items():
        order = sorted(lines, key=lambda line: -sign * line[key])
        place = order.index(ours) + 1
        best = "" if place == 1 else f" (first: {order[0]['way']})"
        said.append(f"- {name}: level 1 of HSDL is number {place} of {len(lines)}{best}")
    return "\n".join(said)


TEXT = """# HSDL beside simpler ways to find groups of experts

Written by `benches/compare_patterns.py`. Real routing of DeepSeek-V2-Lite (26 layers × 64 experts,
top 6), {n_tokens} tokens drawn equally from three tasks (law, intent, summary); {n_test} of them
held out. Every way gets {n_atoms} atoms.

{table}

- **coverage at 10 %**: eq. 8 of arXiv:2504.12359, the share of patterns with exactly two or three
  members (strength of at least 0.5) that are among the 10 % most frequent of all pairs or triplets
  of the training tokens; chance gives 0.10. Ways that make large groups have few such patterns, so
  the two columns after it take pairs and triplets drawn from the members of each atom.
- **held-out error**: of non-negative least-squares codes of held-out tokens, the sum of absolute
  errors over the sum of entries (what HSDL minimises) and of squared errors over squared entries
  (what the codes, NMF and k-means minimise).
- **stability**: mean cosine of the atoms of two seeds, matched one to one; a way without chance
  gets 1 by nature.
- **domain**: bits that the atom of the largest code tells about the task of a held-out token, less
  what shuffled tasks give; at most 1.58.
- **CPU**: seconds of one fit; HSDL, NMF and k-means were fitted to the weights of the tokens.

{verdict}

One model, one kind of data, one number of atoms and default settings: a first look, not a verdict
on the methods.
"""


def main() -> None:
    """Measures every way and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3_000)
    parser.add_argument("--held-out", type=int, default=600)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/patterns.md")
    options = parser.parse_args()
    x, domain = load(options.tokens)
    train, test = x[options.held_out :], x[: options.held_out]
    rows = Rows.of(train)
    floors = {2: 0.0005, 3: 0.0005}
    mined = {
        size: mc.mine(rows, size, n_experts=N_EXPERTS, min_support=floor, null="none", top=10**6)
        for size, floor in floors.items()
    }
    data = {"train": train, "test": test, "rows": rows, "mined": mined}
    data["domain"] = domain[: options.held_out]
    lines = [measure(name, data, options.atoms) for name in WAYS]
    options.out.write_text(page(lines, len(x), options.held_out, options.atoms))


if __name__ == "__main__":
    main()
