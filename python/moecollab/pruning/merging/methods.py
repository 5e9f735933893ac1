"""The published ways of merging experts: who goes with whom, by what weights, whose router row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moecollab.pruning.merging.groups import Groups, around, clusters, distances, in_turn
from moecollab.pruning.merging.seen import Matrix, Recorded, Seen

ROUTERS = ("dominant", "mean")
Router = Literal["dominant", "mean"]
Align = Literal["", "weights", "activity"]

MOST_TAKEN = 16
"""Experts that one centre takes under REAM."""


Grouping = Callable[[Any, Sequence[int], Sequence[int]], Groups]
"""From what was seen, the experts to be grouped and those of them that are kept, to groups."""


@dataclass(frozen=True)
class Method:
    """One way of merging.

    Parameters
    ----------
    name : str
        By which it is asked for.
    grouping : Grouping
        Which experts become one; as many groups as the plan keeps experts.
    shares : {"counts", "saliency", "equal"}
        By what weights are averaged, and which expert of a group gives it its place where the plan
        does not say: the first by this; under "equal" the most used.
    router : {"dominant", "mean"}
        What the group's router row is: that of the expert which gives it its place, or the average
        of all by the same shares.
    align : {"", "weights", "activity"}
        Whether neurons are brought into one order first, and by what they are matched.
    reads_router : bool
        Whether router logits or probabilities are looked at.
    in_order : bool
        Whether a layer sees the text through the merged layers before it.
    centred : bool
        Whether groups are around the experts that the plan keeps, which give them their places.
    recorded : bool
        Whether a recording's counts and mean outputs are enough.
    """

    name: str
    grouping: Grouping
    shares: Literal["counts", "saliency", "equal"]
    router: Router
    align: Align = ""
    reads_router: bool = False
    in_order: bool = False
    centred: bool = False
    recorded: bool = False


def hc_smoe(seen: Seen | Recorded, inside: Sequence[int], kept: Sequence[int]) -> Groups:
    """Clusters of experts whose mean outputs are near, by average linkage.

    Source: HC-SMoE, Chen et al. 2025 (arXiv:2410.08589). Mean outputs over all tokens, Euclidean
    distances; weights averaged by frequency. Differs: there, the router keeps a row for every old
    expert and members of a group share one module, so that a saved file is not smaller; here the
    most used member's row stands for the group. From a recording, means are over routed tokens.
    """
    return _named(inside, clusters(distances(seen.means[list(inside)]), len(kept)))


def m_smoe(seen: Seen, inside: Sequence[int], kept: Sequence[int]) -> Groups:
    """Groups around the experts that the plan keeps, by the cosine of router logits.

    Source: M-SMoE, Li et al. 2024 (arXiv:2310.01334). Neurons matched by their weights, average by
    frequency. There the kept experts are the most used (plan by ``frequency``) and their numbers
    differ by layer; the compression of what is left (MC-SMoE) is not done.
    """
    return _named(inside, around(_among(seen.logit_cosines, inside), _places(inside, kept)))


def dek(seen: Seen, inside: Sequence[int], kept: Sequence[int]) -> Groups:
    """Clusters of experts whose outputs are alike under linear CKA, by average linkage.

    Source: Zhang et al. 2025 (arXiv:2407.09590): similar experts of a layer are merged together
    with their router rows. Differs: the authors' code is not public, so the clustering is ours. CKA
    does not see how large outputs are, nor their mean.
    """
    apart = 1 - _among(seen.cka, inside)
    return _named(inside, clusters(np.maximum((apart + apart.T) / 2, 0), len(kept)))


def ream(seen: Seen, inside: Sequence[int], kept: Sequence[int]) -> Groups:
    """Groups around the experts that the plan keeps; the most salient choose first.

    Source: REAM, 2026 (as described by its code). Each kept expert, in the order of REAP's
    saliency, takes up to 16 of those left that are most like it, by the mean of two cosines: of
    outputs on the same tokens, and of router probabilities along tokens. So most groups hold a
    single expert. Neurons are matched by weights and activity, weights averaged by saliency, and
    every layer sees the text through the merged layers before it. There, the plan is by ``reap``.
    Differs: a neuron's activity is that of its projections, before the nonlinearity.
    """
    alike = (_among(seen.output_cosines, inside) + _among(seen.gate_cosines, inside)) / 2
    order = sorted(kept, key=lambda expert: (-float(seen.saliency[expert]), expert))
    return _named(inside, in_turn(alike, _places(inside, order), MOST_TAKEN))


METHODS = {
    one.name: one
    for one in (
        Method("hc_smoe", hc_smoe, "counts", "dominant", recorded=True),
        Method("m_smoe", m_smoe, "counts", "dominant", "weights", reads_router=True, centred=True),
        Method("dek", dek, "equal", "mean"),
        Method(
            "ream",
            ream,
            "saliency",
            "dominant",
            "activity",
            reads_router=True,
            in_order=True,
            centred=True,
        ),
    )
}
"""All methods that make a smaller model, by name."""


def _among(matrix: Matrix, inside: Sequence[int]) -> Matrix:
    return matrix[np.ix_(list(inside), list(inside))]


def _places(inside: Sequence[int], experts: Sequence[int]) -> list[int]:
    return [list(inside).index(expert) for expert in experts]


def _named(inside: Sequence[int], groups: Groups) -> Groups:
    """Groups of places among some experts as groups of those experts."""
    return [sorted(inside[place] for place in group) for group in groups]
