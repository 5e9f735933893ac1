"""Times mining on real routing resampled to 1 M tokens × 1,728 experts: ``python mine_large.py``.

Tokens are drawn with replacement from the 25,028 real ones (26 layers × 64 experts, top 6); a 27th
layer is the 13th of the following token. In each, one layer's experts are those of another token,
so that hardly any two are equal: some miners count equal ones once, which real text would not give.
Token ids are not recorded there; for ``null="token"`` each token gets one of 50,000 ids, drawn with
probability in proportion to 1 / rank (Zipf's law) and without regard to its experts.
The data folder is taken from ``MOECOLLAB_SHARED``.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

import moecollab as mc
from moecollab._core import mine_sets
from moecollab.record.rows import Rows

ROUTING = (
    Path(os.environ.get("MOECOLLAB_SHARED", Path(__file__).parents[2] / "shared"))
    / "data/routing/deepseek-v2-lite"
)
N_EXPERTS = 64
N_TOKEN_IDS = 50_000


def real_ids() -> np.ndarray:
    """Expert ids of all real tokens, ascending: (25028, 26, 6)."""
    parts = [np.load(ROUTING / f"{task}.npz")["topk_ids"] for task in ("law", "intent", "summary")]
    return np.sort(np.concatenate(parts), axis=2).astype(np.uint32)


def as_rows(ids: np.ndarray) -> Rows:
    """Rows of ones from expert ids (n_tokens, n_layers, top_k)."""
    n_tokens, n_layers, top_k = ids.shape
    first = np.arange(n_layers, dtype=np.uint32)[:, None] * np.uint32(N_EXPERTS)
    sites = (ids + first).reshape(-1)
    indptr = np.arange(n_tokens + 1, dtype=np.int64) * (n_layers * top_k)
    values, sample = np.ones(len(sites), np.float32), np.zeros(n_tokens, np.uint32)
    return Rows(indptr, sites, values, sample, n_layers * N_EXPERTS)


def resampled(n_tokens: int, seed: int = 0) -> Rows:
    """Real tokens drawn with replacement, 27 layers."""
    ids = real_ids()
    more = np.roll(ids[:, 12:13], -1, axis=0)
    whole = np.concatenate([ids, more], axis=1)
    rng = np.random.default_rng(seed)
    drawn = whole[rng.integers(0, len(ids), n_tokens)]
    layer, other = rng.integers(0, 27, n_tokens), rng.integers(0, len(ids), n_tokens)
    drawn[np.arange(n_tokens), layer] = whole[other, layer]
    return as_rows(drawn)


def report(what: str, wall: float, cpu: float, found: object) -> None:
    """One line of the result."""
    print(f"{what:44} wall {wall:7.1f} s  CPU {cpu:7.1f} s  {found}", flush=True)


def timed(what: str, work) -> object:
    """Runs and reports."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    report(what, time.perf_counter() - wall, time.process_time() - cpu, found)
    return found


def zipf(n_tokens: int, seed: int = 0) -> np.ndarray:
    """Token ids in proportion to 1 / rank: uint32 (n_tokens,)."""
    share = 1 / np.arange(1, N_TOKEN_IDS + 1)
    rng = np.random.default_rng(seed)
    return rng.choice(N_TOKEN_IDS, n_tokens, p=share / share.sum()).astype(np.uint32)


def by_token(rows: Rows, threads: int) -> object:
    """All pairs under null="token", asked of the core: ``mine`` takes no token ids with rows."""
    least, top = max(1, rows.n_rows // 1000), 5_000_000
    wanted = {"n_experts": N_EXPERTS, "size": 2, "least": least, "top": top, "by_lift": False}
    wanted |= {"chance": True, "threads": threads}
    arrays, ids = (rows.indptr, rows.sites, rows.values), zipf(rows.n_rows)

    def work() -> int:
        return len(mine_sets(arrays, rows.n_sites, ids, wanted, lambda *_: None)["count"])

    return timed("pairs, null='token', without the table", work)


def peer(rows: Rows, name: str, least: int) -> None:
    """Pairs by one of Borgelt's miners, without and with a list of them."""
    import fim

    objects = np.array(range(rows.n_sites), dtype=object)  # one object per site, not per entry
    baskets = objects[rows.sites].reshape(rows.n_rows, -1).tolist()
    work = getattr(fim, name)
    for shown, says in (("#", "spectrum only"), ("a", "all pairs")):
        timed(
            f"pyfim {name}, {says}",
            lambda r=shown: len(work(baskets, target="s", supp=-least, zmin=2, zmax=2, report=r)),
        )


def main() -> None:
    """Pairs and triplets, and the peer if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of the pairs")
    parser.add_argument("--token", action="store_true")
    parser.add_argument("--triplets", action="store_true")
    parser.add_argument("--peer", help="a miner of pyfim, such as apriori")
    options = parser.parse_args()
    rows = resampled(options.tokens)
    print(f"{rows!r}, {options.threads} threads", flush=True)
    for null in ("none", "load") * options.repeats:
        timed(
            f"pairs, null={null!r}",
            lambda n=null: mc.mine(rows, n_experts=N_EXPERTS, null=n, threads=options.threads),
        )
    if options.token:
        by_token(rows, options.threads)
    if options.triplets:
        timed(
            "triplets with support of 0.1 %",
            lambda: mc.mine(rows, 3, n_experts=N_EXPERTS, threads=options.threads),
        )
    if options.peer:
        peer(rows, options.peer, max(1, options.tokens // 1000))


if __name__ == "__main__":
    main()
