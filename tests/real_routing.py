"""Real per-token routing of a 16 B MoE (26 layers × 64 experts, top 6), if it is there."""

import os
from pathlib import Path

import numpy as np
import pytest

from moecollab.record.rows import Rows

TASKS = ("law", "intent", "summary")
N_EXPERTS = 64


def routing_folder():
    """Folder of the routing files; the test is skipped where it is absent."""
    shared = os.environ.get("MOECOLLAB_SHARED", Path(__file__).parents[2] / "shared")
    folder = Path(shared) / "data" / "routing" / "deepseek-v2-lite"
    if not folder.is_dir():
        pytest.skip(f"real routing is not at {folder}; set MOECOLLAB_SHARED")
    return folder


def read(folder, tasks=TASKS):
    """Expert ids and weights (n_tokens, 26, 6), and the task's number of every token."""
    files = [np.load(Path(folder) / f"{task}.npz") for task in tasks]
    ids = np.concatenate([found["topk_ids"] for found in files]).astype(np.int64)
    weights = np.concatenate([found["topk_weights"] for found in files])
    return ids, weights, np.repeat(np.arange(len(files)), [len(f["topk_ids"]) for f in files])


def load_routing(folder, n_rows=None, seed=0):
    """Token rows with weights renormalised per layer; `n_rows` of them at random, in order."""
    ids, weights, task = read(folder)
    if n_rows is not None:
        picked = np.sort(np.random.default_rng(seed).permutation(len(ids))[:n_rows])
        ids, weights, task = ids[picked], weights[picked], task[picked]
    return as_token_rows(ids, weights, task)


def resampled(folder, n_rows, seed=0):
    """As many token rows as wanted, 27 layers: the paper's shape from real routing.

    A token is drawn, and takes its layers after a random one from the next token of the text, so
    that rows hardly repeat; the 27th layer is the 13th of the next token.
    """
    ids, weights, _ = read(folder)
    rng = np.random.default_rng(seed)
    token, cut = rng.integers(0, len(ids) - 1, n_rows), rng.integers(1, 27, n_rows)
    layers = [*range(26), 12]
    drawn = [(token + ((at >= cut) | (at == 26)), layer) for at, layer in enumerate(layers)]
    sites, values = np.empty((n_rows, 27, 6), np.uint32), np.empty((n_rows, 27, 6), np.float32)
    for at, (row, layer) in enumerate(drawn):
        order = np.argsort(ids[row, layer], axis=1)
        share = weights[row, layer] / weights[row, layer].sum(axis=1, keepdims=True)
        sites[:, at] = np.take_along_axis(ids[row, layer], order, 1) + N_EXPERTS * at
        values[:, at] = np.take_along_axis(share, order, 1)
    pointers = np.arange(n_rows + 1, dtype=np.int64) * (27 * 6)
    number = np.arange(n_rows, dtype=np.uint32)
    return Rows(pointers, sites.reshape(-1), values.reshape(-1), number, 27 * N_EXPERTS)


def as_token_rows(ids, weights, sample):
    """Rows of chosen experts and weights, both of shape (n_tokens, n_layers, top_k)."""
    n_tokens, n_layers, top_k = ids.shape
    share = weights / weights.sum(axis=2, keepdims=True)
    sites = (ids + N_EXPERTS * np.arange(n_layers)[None, :, None]).reshape(n_tokens, -1)
    order = np.argsort(sites, axis=1)
    return Rows(
        np.arange(n_tokens + 1, dtype=np.int64) * n_layers * top_k,
        np.take_along_axis(sites, order, 1).reshape(-1).astype(np.uint32),
        np.take_along_axis(share.reshape(n_tokens, -1), order, 1).reshape(-1).astype(np.float32),
        sample.astype(np.uint32),
        n_layers * N_EXPERTS,
    )
