"""Which experts of a layer are merged with which: arithmetic on similarities, no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

Groups = list[list[int]]
"""A partition of expert ids; the order within a group means nothing."""


def clusters(distances: NDArray[np.float64], n_groups: int) -> Groups:
    """Clusters by average linkage, exactly as many as asked for.

    Parameters
    ----------
    distances : float64 array of shape (n, n)
        Symmetric, 0 on the diagonal.
    n_groups : int
        Clusters, in [1, n].

    Examples
    --------
    >>> apart = np.abs(np.subtract.outer([0.0, 1.0, 5.0], [0.0, 1.0, 5.0]))
    >>> clusters(apart, 2)
    [[0, 1], [2]]
    """
    n = len(distances)
    held = {number: [number] for number in range(n)}
    if n_groups < n:
        tree = linkage(squareform(distances, checks=False), method="average")
        # Counting steps gives the asked number under ties too, which cutting by height does not.
        for step, (first, second) in enumerate(tree[: n - n_groups, :2].astype(int).tolist()):
            held[n + step] = sorted(held.pop(first) + held.pop(second))
    return sorted(held.values())


def around(similarity: NDArray[np.float64], centres: Sequence[int]) -> Groups:
    """Each expert with the centre that it is most like; of equals the first.

    Parameters
    ----------
    similarity : float64 array of shape (n, n)
        Higher is more alike.
    centres : sequence of int
        Experts that end up in groups of their own.

    Examples
    --------
    >>> around(np.array([[1.0, 0.2, 0.9], [0.2, 1.0, 0.1], [0.9, 0.1, 1.0]]), [0, 1])
    [[0, 2], [1]]
    """
    found: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for expert in range(len(similarity)):
        if expert not in found:
            nearest = max(centres, key=lambda centre: float(similarity[expert, centre]))
            found[nearest].append(expert)
    return list(found.values())


def in_turn(similarity: NDArray[np.float64], centres: Sequence[int], most: int) -> Groups:
    """Each centre in turn takes the experts left that are most like it, up to a number.

    Experts that no centre could take join the one that they are most like.

    Parameters
    ----------
    similarity : float64 array of shape (n, n)
        Higher is more alike.
    centres : sequence of int
        Experts with groups of their own, who chooses first first.
    most : int
        Experts that a centre takes.

    Examples
    --------
    >>> alike = np.array([[1, 0, 0.9, 0.1], [0, 1, 0, 0.8], [0.9, 0, 1, 0], [0.1, 0.8, 0, 1]])
    >>> in_turn(alike, [0, 1], most=2)
    [[0, 2, 3], [1]]
    """
    left = [expert for expert in range(len(similarity)) if expert not in set(centres)]
    found = {}
    for centre in centres:
        nearest = sorted(left, key=lambda one: (-float(similarity[centre, one]), one))[:most]
        found[centre] = [centre, *nearest]
        left = [one for one in left if one not in set(nearest)]
    for expert in left:
        found[max(centres, key=lambda one: float(similarity[expert, one]))].append(expert)
    return list(found.values())


def cosines(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of every two rows (n, d), 0 with a row of zeros: (n, n)."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1)
    found: NDArray[np.float64] = unit @ unit.T
    return found


def distances(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances of every two rows (n, d): (n, n)."""
    found: NDArray[np.float64] = np.stack([np.linalg.norm(rows - row, axis=1) for row in rows])
    return found


def alignments(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear CKA of every two experts: (n_experts, n_experts), 1 for scaled and shifted copies.

    CKA(i, j) = ‖Yᵢᵀ Yⱼ‖² / (‖Yᵢᵀ Yᵢ‖ ‖Yⱼᵀ Yⱼ‖) with outputs Y centred over tokens. The numerator is
    the product of the tokens' Gram matrices Yᵢ Yᵢᵀ and Yⱼ Yⱼᵀ, summed.

    Parameters
    ----------
    outputs : float64 array of shape (n_experts, n_tokens, hidden)
        Of all experts on the same tokens.
    """
    centred = outputs - outputs.mean(axis=1, keepdims=True)
    grams = np.stack([(one @ one.T).ravel() for one in centred])
    return cosines(grams)
