"""What others found on published routing of a 16 B model: the same through import, score and plan.

26 layers × 64 experts, top 6. The published figures have three digits.
"""

import numpy as np
import pytest

import dumps
import moecollab as mc
import real_routing

STABLE = {"intent": 0.919, "law": 0.854, "summary": 0.814}
"""Jaccard index of the 32 most frequent experts of even and odd sequences, mean over layers."""

MASS = {
    "intent": (0.603, 0.830, 0.952),
    "law": (0.517, 0.763, 0.916),
    "summary": (0.527, 0.772, 0.926),
}
"""Share of the gate mass of the best 25, 50 and 75 % of a layer's experts, mean over layers."""


@pytest.fixture(scope="module", params=sorted(MASS))
def task(request):
    return request.param


@pytest.fixture(scope="module")
def halves(task, tmp_path_factory):
    """Folders of a task's routing, alternate sequences each."""
    arrays = np.load(real_routing.routing_folder() / f"{task}.npz")
    lengths, work = arrays["seq_lens"], tmp_path_factory.mktemp(task)
    odd = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return [
        dumps.write_esft(work / str(half), _truth(arrays, odd == half, half)) for half in (0, 1)
    ]


def _truth(arrays, chosen, half):
    return dumps.Truth(
        ids=arrays["topk_ids"][chosen],
        weights=arrays["topk_weights"][chosen],
        token_ids=np.zeros(chosen.sum()),
        lengths=tuple(arrays["seq_lens"][half::2].tolist()),
        n_experts=64,
        layers=tuple(arrays["moe_layer_ids"].tolist()),
    )


@pytest.fixture(scope="module")
def whole(halves, tmp_path_factory):
    out = tmp_path_factory.mktemp("acts")
    return mc.import_routing("esft", halves, out=out / "a", experts=64, top_k=6)


def kept(scores, drop):
    """The experts that stay in each layer."""
    return [set(own) for own in mc.plan(scores, drop=drop).keep.values()]


def test_half_the_sequences_choose_nearly_the_same_experts(task, halves, tmp_path):
    first, second = (
        kept(mc.score("frequency", _imported(half, tmp_path / half.name)), 0.5) for half in halves
    )
    found = [len(one & other) / len(one | other) for one, other in zip(first, second, strict=True)]
    assert np.mean(found) == pytest.approx(STABLE[task], abs=0.01)


def _imported(folder, out):
    return mc.import_routing("esft", folder, out=out, experts=64, top_k=6)


@pytest.mark.parametrize(("place", "drop"), [(0, 0.75), (1, 0.5), (2, 0.25)])
def test_mass_of_the_best_experts(task, whole, place, drop):
    scores = mc.score("gate_sum", whole)
    held = [
        row[sorted(own)].sum() for row, own in zip(scores.values, kept(scores, drop), strict=True)
    ]
    share = np.mean(held / scores.values.sum(axis=1))
    assert share == pytest.approx(MASS[task][place], abs=0.01)


def test_counts_and_gates_rank_alike(whole):
    """87 to 91 % of the better half is the same."""
    first, second = (kept(mc.score(name, whole), 0.5) for name in ("frequency", "gate_sum"))
    shared = np.mean([len(one & other) / 32 for one, other in zip(first, second, strict=True)])
    assert 0.87 - 0.01 <= shared <= 0.91 + 0.01
