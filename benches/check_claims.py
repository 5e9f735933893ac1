"""The paper's testable claims about expert collaboration on real routing, held or not.

    python benches/check_claims.py ../shared/data/routing/deepseek-v2-lite

Names as in the project's notes on arXiv:2504.12359. A5 to A9 and A11 need a model's answers.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import moecollab as mc
from moecollab.criteria import get
from moecollab.criteria.base import Evidence
from moecollab.record.tallies import Tallies
from real_routing import N_EXPERTS, load_routing


def say(claim, text):
    """One line of the table."""
    print(f"| {claim} | {text} |", flush=True)


def lift(rows):
    """A1: cross-layer pairs against the same routing with each layer's tokens permuted."""
    rng = np.random.default_rng(0)
    real = mc.mine(rows, n_experts=N_EXPERTS, top=rows.n_sites**2, min_support=1e-9).table
    across = real.filter(pl.col("layer_a") != pl.col("layer_b"))
    dense = rows.dense().reshape(rows.n_rows, -1, N_EXPERTS)
    for layer in range(dense.shape[1]):
        dense[:, layer] = dense[rng.permutation(rows.n_rows), layer]
    shuffled = mc.mine(
        type(rows).of(dense.reshape(rows.n_rows, -1)),
        n_experts=N_EXPERTS,
        top=rows.n_sites**2,
        min_support=1e-9,
    ).table.filter(pl.col("layer_a") != pl.col("layer_b"))
    often = pl.col("expected") >= 20
    bar = shuffled.filter(often)["lift"].quantile(0.999)
    found = across.filter(often)
    above = (found["lift"] > bar).mean()
    top = found["lift"].top_k(1000).min()
    say(
        "A1",
        f"cross-layer pairs expected in ≥ 20 tokens: 99.9th percentile of permuted lift "
        f"{bar:.2f}; {above:.1%} of the real pairs lie above it, the top 1,000 from {top:.1f} up",
    )
    named = across.filter(pl.col("q") < 0.05)
    n_above = (named["count"] > named["expected"]).sum()
    share = f"{n_above:,} of {len(across):,} cross-layer pairs"
    say("A1", f"{share} above chance at q < 0.05 (load null)")


def hierarchy(rows):
    """A2 to A4 and A10: groups of two and three members, sizes by level, the size term."""
    hsdl = mc.HSDL(atoms=(128, 512))
    fit = hsdl.fit(rows)
    shares = (0.01, 0.05, 0.1, 0.2)
    for size in (2, 3):
        mined = mc.mine(rows, size, n_experts=N_EXPERTS, null="none")
        sets = [
            [(site // N_EXPERTS, site % N_EXPERTS) for site in np.flatnonzero(atom >= 0.5)]
            for level in fit.levels
            for atom in level.atoms[level.peak > 0]
        ]
        table = mc.coverage(sets, mined, rows, shares=shares)
        cells = ", ".join(
            f"{s:.0%}: {c:.2f}" for s, c in table["share", "coverage"].iter_rows() if c is not None
        )
        say("A2", f"coverage of the {table['n_patterns'][0]} groups of {size} members at {cells}")
    means = [(level.atoms[level.peak > 0] >= 0.5).sum(axis=1).mean() for level in fit.levels]
    say("A3", f"mean members: level 1 {means[0]:.1f}, level 2 {means[1]:.1f}")
    for reconstruction in (3.0, 10.0, 30.0):
        settings = {"atoms": (512,), "sparsity": 1.0, "reconstruction": reconstruction}
        paid, free = (mc.HSDL(dictionary_size=s, **settings).fit(rows) for s in (1.0, 0.0))
        errors = [one.history[-1]["reconstruction"] for one in (paid, free)]
        say(
            "A4",
            f"λ₂ {reconstruction:g}: {paid.live(1).sum()} of 512 groups in use with the size "
            f"term, {free.live(1).sum()} without; errors {errors[0]:.2f} and {errors[1]:.2f}",
        )


def control(rows):
    """CAEP beside routing mass, which is CAEP with X in place of D R; and beside chance."""
    fit = mc.HSDL().fit(rows)
    shape = (rows.n_sites // N_EXPERTS, N_EXPERTS)
    mass = np.bincount(rows.sites, rows.values, rows.n_sites).reshape(shape)
    level = fit.levels[0]
    known = {"D r": (level.usage @ level.atoms).reshape(shape)}
    for drop in (0.25, 0.5, 0.75):
        evidence = Evidence(
            tallies=Tallies.zeros(("all",), *shape, groups=("routing",)).total(),
            top_k=6,
            collaboration=fit,
            drop=drop,
        )
        scores = {name: get(name).function(evidence) for name in ("caep", "caep_composed")} | known
        for name, found in scores.items():
            shared = [overlap(found, mass, drop, whole) for whole in (True, False)]
            say(
                "control",
                f"{drop:.0%} dropped by {name}: {shared[0]:.3f} of the experts kept are those that "
                f"routing mass keeps, {shared[1]:.3f} with equal numbers per layer",
            )
    say("control", f"{spearman(known['D r'], mass):.4f} is Spearman's correlation of D r with mass")


def overlap(one, other, drop, whole):
    """Share of the experts kept by one that the other keeps too."""
    first, second = (
        kept(scores.reshape(1, -1) if whole else scores, drop) for scores in (one, other)
    )
    return (first & second).sum() / first.sum()


def kept(scores, drop):
    """Which experts of every row stay."""
    n_kept = scores.shape[1] - int(drop * scores.shape[1] + 0.5)
    mask = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n_kept]
    np.put_along_axis(mask, order, True, 1)
    return mask


def spearman(one, other):
    """Rank correlation over all experts."""
    ranks = [np.argsort(np.argsort(scores.ravel())) for scores in (one, other)]
    return np.corrcoef(*ranks)[0, 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    print("| Claim | Measured |\n| --- | --- |")
    lift(load_routing(options.folder))
    hierarchy(load_routing(options.folder, options.rows))
    control(load_routing(options.folder))


if __name__ == "__main__":
    main()
