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


def load_routing(folder, n_rows=None, seed=0):
    """Token rows with weights renormalised per layer; `n_rows` of them at random, in order."""
    files = [np.load(Path(folder) / f"{task}.npz") for task in TASKS]
    ids = np.concatenate([found["topk_ids"] for found in files]).astype(np.int64)
    weights = np.concatenate([found["topk_weights"] for found in files]).astype(np.float64)
    task = np.repeat(np.arange(len(files)), [len(found["topk_ids"]) for found in files])
    if n_rows is not None:
        picked = np.sort(np.random.default_rng(seed).permutation(len(ids))[:n_rows])
        ids, weights, task = ids[picked], weights[picked], task[picked]
    return as_token_rows(ids, weights, task)


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
