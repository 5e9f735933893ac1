"""Criteria that run the model again: with experts hidden, with gradients, or all at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs


def leave_one_out(evidence: Evidence, /) -> NDArray[np.float64]:
    """Share of each block's output that goes wrong without the expert.

    Formula: s(l, e) = Σ_t ‖y'(t, l, e) - y(t, l)‖₂² / Σ_t ‖y(t, l)‖₂², y what the block returns and
        y' the same when e cannot be chosen, both on the unpruned model's inputs
    Needs: model
    Direction: higher is kept
    Cost: half a forward pass or more, then about top_k passes through each block: only tokens that
        chose e run again; n_experts passes where weights are shares of all experts' probability
    Source: mean squared error of NVIDIA's Model Optimizer (Puzzletron), times the share of tokens
        that are displaced; differs: divided by the size of the block's output, so that layers
        compare
    Not defined when: a block returns 0 for all tokens; its experts score 0
    """
    from moecollab.criteria.probing.reconstruction import squared_errors

    return squared_errors(evidence)


def leave_one_out_cos(evidence: Evidence, /) -> NDArray[np.float64]:
    """How far each block's output turns without the expert.

    Formula: s(l, e) = Σ_t (1 - cos(y'(t, l, e), y(t, l))) / T, y and y' as in ``leave_one_out``
    Needs: model
    Direction: higher is kept
    Cost: that of ``leave_one_out``
    Source: cosine form of NVIDIA's Model Optimizer (Puzzletron), times the share of tokens that are
        displaced
    Not defined when: an output is 0; its cosine counts 0
    """
    from moecollab.criteria.probing.reconstruction import cosine_errors

    return cosine_errors(evidence)


def naee(evidence: Evidence, /) -> NDArray[np.float64]:
    """Rank of falling, the experts first without which the block does best.

    Formula: of all sets D of r = floor(drop n_experts + 1/2) experts of a layer that with the least
        Σ_w ‖Y'_w - Y_w‖_F, Y_w what the block returns for a window w and Y'_w the same when none of
        D can be chosen; s = rank, those of D first, inside and outside by what each costs alone.
        Where there are more than 500 sets, one expert at a time: that which adds least, r times;
        the rest follow by what each would have cost at the last step
    Needs: model
    Direction: higher is kept
    Cost: C(n_experts, r) + n_experts times the tokens that chose a hidden expert run through the
        block again; one by one, about r top_k passes through each block
    Source: NAEE, Lu et al. 2024 (arXiv:2402.14800), layer-wise pruning, windows as its batches;
        differs: all layers on the unpruned model's inputs, and the greedy search beyond 500 sets
    Not defined when: never; of equal sets, the experts with larger ids fall
    """
    from moecollab.criteria.probing.reconstruction import subset_ranks

    return subset_ranks(evidence)


def delta_nll(evidence: Evidence, /) -> NDArray[np.float64]:
    """What the next-token loss gains when the expert is removed from the whole model.

    Formula: s(l, e) = (L(l, e) - L) / n, L the summed loss in nats of the text's n predicted tokens
        and L(l, e) the same when e alone cannot be chosen
    Needs: model
    Direction: higher is kept
    Cost: for every layer and expert the layers from there on, on the windows in which a token
        chooses it: up to n_layers n_experts / 2 forward passes
    Source: causal ablation, as in the audit of pruning criteria arXiv:2606.10703
    Not defined when: never; an expert that no token chooses scores 0, and one that does harm less
    """
    from moecollab.criteria.probing.ablation import loss_differences

    return loss_differences(evidence)


def fisher(evidence: Evidence, /) -> NDArray[np.float64]:
    """How much what each expert adds to a token decides of the words that follow.

    Formula: s(l, e) = Σ_t (∇ log p · g(t, l, e) f(t, l, e))² / T, ∇ log p the gradient by the
        layer's routed output at t of the log-probability of words drawn from the model after every
        token, one at each
    Needs: model
    Direction: higher is kept
    Cost: one forward and one backward pass
    Source: ours: the diagonal of the Fisher information of a gain on every output, summed over
        tokens; after optimal brain damage (LeCun et al. 1990), and near HEAPr, which has parts of
        experts
    Not defined when: never; an expert that no token chooses scores 0
    """
    from moecollab.criteria.probing.gains import fisher_information

    return fisher_information(evidence)


def egs(evidence: Evidence, /) -> NDArray[np.float64]:
    """How much each expert's gradient differs from those of its layer's others.

    Formula: s(l, e) = -Σ_{e' ≠ e} cos(G(l, e), G(l, e')), G the gradient of the text's summed
        next-token loss by all entries of an expert's matrices
    Needs: model
    Direction: higher is kept; the most similar goes first, so the sum is negated
    Cost: one forward and backward pass for each 4 GB of gradients, in float32
    Source: EGS of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions
    Not defined when: no token chooses an expert; its cosines count 0
    """
    from moecollab.criteria.probing.gradients import of_gradients
    from moecollab.models.weight_statistics import matrix_cosines

    return -of_gradients(evidence, matrix_cosines)


def ege(evidence: Evidence, /) -> NDArray[np.float64]:
    """Logarithms of the spread of each column of the expert's gradient, added up.

    Formula: s(l, e) = Σ_c log σ_c(l, e), σ_c the standard deviation of column c of G, over all
        columns of all of the expert's matrices, and at least 1e-12; G as in ``egs``
    Needs: model
    Direction: higher is kept
    Cost: that of ``egs``
    Source: EGE of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), its second best: the smallest
        goes first. Columns, which are an expert's inputs or hidden units as the model stores its
        matrices, stand for the channels of activations
    Not defined when: no token chooses an expert; every column counts log 1e-12
    """
    from moecollab.criteria.probing.gradients import log_spreads, of_gradients

    return of_gradients(evidence, log_spreads)


def ego(evidence: Evidence, /) -> NDArray[np.float64]:
    """Entries of the expert's gradient that are far from their column's mean.

    Formula: s(l, e) = number of entries of G further than three standard deviations of their column
        from its mean; G as in ``egs``
    Needs: model
    Direction: higher is kept
    Cost: that of ``egs``
    Source: EGO of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions;
        columns as in ``ege``
    Not defined when: no token chooses an expert; it scores 0
    """
    from moecollab.criteria.probing.gradients import far_entries, of_gradients

    return of_gradients(evidence, far_entries)


def egn(evidence: Evidence, /) -> NDArray[np.float64]:
    """Norm of each column of the expert's gradient, added up over columns.

    Formula: s(l, e) = Σ_c ‖G_c(l, e)‖₂ over the columns of all of the expert's matrices; G as in
        ``egs``
    Needs: model
    Direction: higher is kept
    Cost: that of ``egs``
    Source: EGN of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions;
        columns as in ``ege``
    Not defined when: no token chooses an expert; it scores 0
    """
    from moecollab.criteria.probing.gradients import channel_norms, of_gradients

    return of_gradients(evidence, channel_norms)


def eas(evidence: Evidence, /) -> NDArray[np.float64]:
    """How much each expert's outputs differ from the others' on the same tokens.

    Formula: s(l, e) = -Σ_{e' ≠ e} Σ_t cos(f(t, l, e), f(t, l, e')) / T, all experts on all T tokens
    Needs: model
    Direction: higher is kept; the most similar goes first, so the sum is negated
    Cost: one forward pass, and every expert on every token
    Source: EAS of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions
    Not defined when: an output is 0; its cosines count 0
    """
    from moecollab.criteria.probing.everywhere import output_cosines

    return -output_cosines(evidence)


def eao(evidence: Evidence, /) -> NDArray[np.float64]:
    """Entries of the expert's outputs that are far from their channel's mean.

    Formula: s(l, e) = number of tokens t and channels c with |f_c(t, l, e) - μ_c| > 3 σ_c, mean μ
        and standard deviation σ of f_c(·, l, e); all experts on all tokens
    Needs: model
    Direction: higher is kept
    Cost: one forward pass, and every expert three times on every token
    Source: EAO of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions
    Not defined when: never
    """
    from moecollab.criteria.probing.everywhere import far_outputs

    return far_outputs(evidence)


CRITERIA = (
    Criterion("leave_one_out", Needs.MODEL, leave_one_out),
    Criterion("leave_one_out_cos", Needs.MODEL, leave_one_out_cos),
    Criterion("naee", Needs.MODEL, naee, by_drop=True),
    Criterion("delta_nll", Needs.MODEL, delta_nll),
    Criterion("fisher", Needs.MODEL, fisher),
    Criterion("egs", Needs.MODEL, egs),
    Criterion("ege", Needs.MODEL, ege),
    Criterion("ego", Needs.MODEL, ego),
    Criterion("egn", Needs.MODEL, egn),
    Criterion("eas", Needs.MODEL, eas),
    Criterion("eao", Needs.MODEL, eao),
)
