"""Ways to use patterns and coverage that are studied, not offered.

``pattern_variants.register_variants()`` beside this file, then ``mc.score("coverage_3", …)`` or
``mc.compare``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import moecollab as mc
from moecollab._core import caep_ranking
from moecollab.criteria import Criterion, Needs
from moecollab.criteria.base import Evidence
from moecollab.criteria.caep import ranks, threshold_fraction
from moecollab.criteria.coverage import (
    by_layer,
    explained_rows,
    fitted_rows,
    harm,
    pattern_rows,
    token_rows,
    turned,
)
from moecollab.record.rows import Rows

MOST_LIFT = 4.0
"""Lifts beyond this, or below one over it, count as much as this."""
MEMBER = 0.5
"""Least strength of a member whose joint use is counted."""
ROUNDS = 12
STEP = 2.0
"""Rounds and step of multiplicative weights: the worst domain gains a factor e² at most."""


def coverage_3(evidence: Evidence, /) -> np.ndarray:
    """Harm to tokens, with losses taken together counting still more.

    Formula: as ``coverage`` with p = 3
    Needs: output norms, shift, tokens
    Direction: higher is kept
    Cost: as ``coverage``
    Source: ours
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(_coverage_rows(evidence), power=3.0).reshape(evidence.shape)


def pattern_coverage_3(evidence: Evidence, /) -> np.ndarray:
    """Harm to patterns, with losses taken together counting still more.

    Formula: as ``pattern_coverage`` with p = 3
    Needs: output norms, tokens, collaboration
    Direction: higher is kept
    Cost: as ``pattern_coverage``
    Source: ours
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(pattern_rows(evidence), power=3.0).reshape(evidence.shape)


def pattern_coverage_2(evidence: Evidence, /) -> np.ndarray:
    """Harm to the finest patterns.

    Formula: as ``pattern_coverage`` with the atoms of the finest level and the usage of composed
        codes
    Needs: output norms, tokens, collaboration
    Direction: higher is kept
    Cost: as ``pattern_coverage``
    Source: ours
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(pattern_rows(evidence, -1)).reshape(evidence.shape)


def caep_output(evidence: Evidence, /) -> np.ndarray:
    """The ranking of ``caep`` with contributions in units of output.

    Formula: as ``caep`` with D(a, s) O(s) / X(s) in place of D(a, s), X the sums of the fitted rows
        and O(s) = Σ_t g ‖f‖, all divided by the largest factor
    Needs: output norms, tokens, collaboration
    Direction: higher is kept
    Cost: as ``caep``, and reads the recording to add up X
    Source: Algorithm 1 of Tang et al. 2025 (arXiv:2504.12359) on other contributions
    Not defined when: never; an expert that is in no pattern falls first
    """
    level = evidence.collaboration.levels[0]
    fitted, output = _fitted_sums(evidence), evidence.tallies["sum_weighted_norm"].ravel()
    factor = np.divide(output, fitted, out=np.zeros(len(fitted)), where=fitted > 0)
    atoms = (level.atoms * (factor / factor.max())).astype(np.float32)
    found = caep_ranking(atoms, level.usage, level.peak, threshold_fraction(evidence.drop))
    return ranks(found["step"], found["contribution"]).reshape(evidence.shape)


def lift(evidence: Evidence, /) -> np.ndarray:
    """Contribution to patterns, counted by how much oftener members meet than by chance.

    Formula: s = Σ_a w_a v_a(s) + what atoms leave, v_a as in ``pattern_coverage``, and w_a =
        Σ_{i≠j} d_i d_j n_ij / Σ_{i≠j} d_i d_j n_i n_j T⁻¹ over members i, j of strength d ≥ 0.5,
        n_i and n_ij the tokens of T that use one and both; at least ¼ and at most 4, 1 for lone
        members
    Needs: output norms, tokens, collaboration
    Direction: higher is kept
    Cost: O(n_atoms n_layers n_tokens top_k)
    Source: ours; lift of association rules, Brin et al. 1997
    Not defined when: never; an expert without tokens scores 0
    """
    rows = pattern_rows(evidence)
    n_atoms = len(evidence.collaboration.levels[0].atoms)
    weight = np.ones(rows.n_rows)
    weight[:n_atoms] = _lifts(evidence.collaboration.levels[0].atoms, evidence)
    return harm(rows, weight, power=1.0).reshape(evidence.shape)


def _lifts(atoms: np.ndarray, evidence: Evidence) -> np.ndarray:
    """Clipped joint use over what single loads give: (n_atoms,).

    With z_t = Σ_i d_i used_ti, Σ_{i≠j} d_i d_j n_ij = Σ_t z_t² - Σ_i d_i² n_i.
    """
    strength = np.where(atoms >= MEMBER, atoms, 0).astype(np.float64)
    together, count, n_tokens = np.zeros(len(atoms)), np.zeros(atoms.shape[1]), 0
    for rows in evidence.activations.token_blocks("binary", 8_192):
        together += ((_matrix(rows) @ strength.T) ** 2).sum(axis=0)
        count += np.bincount(rows.sites, minlength=rows.n_sites)
        n_tokens += rows.n_rows
    joint = together - strength**2 @ count
    expected = ((strength @ count) ** 2 - strength**2 @ count**2) / n_tokens
    some = (expected > 1e-9 * (strength @ count) ** 2 / n_tokens) & (expected > 0)
    found = np.divide(joint, expected, out=np.ones(len(atoms)), where=some)
    return np.clip(found, 1 / MOST_LIFT, MOST_LIFT)


def redundancy(evidence: Evidence, /) -> np.ndarray:
    """Harm to patterns, of each member only what its pattern-mates cannot put out.

    Formula: as ``pattern_coverage`` with v_a(s) ρ_a(s) in place of v_a(s); ρ² = 1 - hᵀ G⁻¹ h is
        what is left of the direction u_s of the mean output when those of the layer-mates m in the
        atom are taken out, as far as they are members: h_m = d_m u_m·u_s, G_mn = d_m d_n u_m·u_n,
        G_mm = 1, with d = D(a, ·)
    Needs: output norms, channels, tokens, collaboration
    Direction: higher is kept
    Cost: O(n_layers n_experts² width), and the inverse of a matrix for each member of an atom
    Source: ours
    Not defined when: an expert has no tokens; it scores 0
    """
    rows = pattern_rows(evidence)
    atoms = evidence.collaboration.levels[0].atoms
    n_experts = evidence.shape[1]
    left = np.ones(atoms.shape)
    for layer, total in enumerate(evidence.tallies["sum_output"]):
        own = slice(layer * n_experts, (layer + 1) * n_experts)
        left[:, own] = _residuals(atoms[:, own], _likeness(total))
    atom = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    of_atom = atom < len(atoms)
    values = rows.values.copy()
    values[of_atom] *= left[atom[of_atom], rows.sites[of_atom]].astype(np.float32)
    changed = Rows(rows.indptr, rows.sites, values, rows.sample, rows.n_sites)
    return harm(changed).reshape(evidence.shape)


def _likeness(total: np.ndarray) -> np.ndarray:
    """Cosines of experts' mean outputs from their sums (n_experts, width)."""
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    unit = np.divide(total, norm, out=np.zeros(total.shape), where=norm > 0)
    return unit @ unit.T


def _residuals(atoms: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """ρ of the members of every atom within one layer: (n_atoms, n_experts)."""
    left = np.ones(atoms.shape)
    for atom, strengths in enumerate(atoms):
        members = np.flatnonzero(strengths)
        for at, member in enumerate(members if len(members) > 1 else ()):
            mates = np.delete(members, at)
            d = strengths[mates].astype(np.float64)
            gram = d[:, None] * likeness[np.ix_(mates, mates)] * d
            np.fill_diagonal(gram, 1.0)
            h = d * likeness[mates, member]
            spanned = h @ np.linalg.lstsq(gram, h, rcond=1e-9)[0]
            left[atom, member] = np.sqrt(min(max(1.0 - spanned, 0.0), 1.0))
    return left


def fair_coverage(evidence: Evidence, /) -> np.ndarray:
    """Harm to tokens of the domain that a cut harms most.

    Formula: as ``coverage`` with tokens weighted by λ_d / M_d, M_d the mass of their domain d; λ
        starts equal and grows by exp(2 h_d / max h) in each of 12 rounds, h_d being the share of
        M_d that the first `drop` of all experts harm; the round of the least max h is taken
    Needs: output norms, shift, tokens
    Direction: higher is kept
    Cost: 12 times ``coverage``
    Source: ours; multiplicative weights, Arora et al. 2012
    Not defined when: never; an expert without tokens scores 0
    """
    rows = _coverage_rows(evidence)
    domain = _domains(evidence)[rows.sample]
    return _fairest(rows, domain, evidence.drop).reshape(evidence.shape)


def fair_patterns(evidence: Evidence, /) -> np.ndarray:
    """Harm to patterns in the domain that a cut harms most.

    Formula: as ``fair_coverage`` with an atom in each domain in place of a token: usage and sums of
        ``pattern_coverage`` by domain
    Needs: output norms, tokens, collaboration
    Direction: higher is kept
    Cost: 12 times ``pattern_coverage`` with as many atoms more as there are domains
    Source: ours; multiplicative weights, Arora et al. 2012
    Not defined when: never; an expert without tokens scores 0
    """
    parts = _domain_rows(evidence)
    domain = np.repeat(np.arange(len(parts)), [part.n_rows for part in parts])
    return _fairest(Rows.join(parts), domain, evidence.drop).reshape(evidence.shape)


def _domain_rows(evidence: Evidence) -> list[Rows]:
    """Rows of patterns in each domain, in units of g ‖f‖ there."""
    level, codes = evidence.collaboration.levels[0], evidence.collaboration.codes
    output = evidence.by_domain["sum_weighted_norm"]
    n_domains, (n_atoms, n_sites) = len(output), level.atoms.shape
    of_sample, fitted, of_row = _domains(evidence), np.zeros(n_domains * n_sites), []
    for rows in fitted_rows(evidence):
        of_row.append(of_sample[rows.sample])
        at = np.repeat(of_row[-1], np.diff(rows.indptr)) * n_sites + rows.sites
        fitted += np.bincount(at, rows.values, len(fitted))
    place = np.concatenate(of_row)[codes.row] * n_atoms + codes.atom
    usage = np.bincount(place, codes.value, n_domains * n_atoms).reshape(n_domains, n_atoms)
    parts = zip(usage, fitted.reshape(n_domains, n_sites), output, strict=True)
    return [explained_rows(level.atoms, use, sums, out.ravel()) for use, sums, out in parts]


def _fairest(rows: Rows, domain: np.ndarray, drop: float) -> np.ndarray:
    """What sites add under the weights of domains that harm the worst of them least."""
    mass = np.bincount(domain, _row_sums(rows))
    scale = np.divide(1.0, mass, out=np.zeros(len(mass)), where=mass > 0)
    n_gone = int(drop * rows.n_sites + 0.5)
    share, best, least = np.full(len(mass), 1 / len(mass)), np.zeros(rows.n_sites), np.inf
    for _ in range(ROUNDS):
        added = harm(rows, (share * scale)[domain])
        gone = np.argsort(added, kind="stable")[:n_gone]
        harmed = np.bincount(domain, _row_harms(rows, gone)) * scale
        if harmed.max() < least:
            best, least = added, harmed.max()
        if not harmed.max() > 0:
            break
        share = share * np.exp(STEP * harmed / harmed.max())
        share /= share.sum()
    return best


def _row_harms(rows: Rows, gone: np.ndarray) -> np.ndarray:
    """m x² of every row when some sites are gone."""
    lost = np.isin(np.arange(rows.n_sites), gone)[rows.sites]
    mass, part = _row_sums(rows), _row_sums(rows, lost)
    return np.divide(part**2, mass, out=np.zeros(rows.n_rows), where=mass > 0)


def _row_sums(rows: Rows, chosen: np.ndarray | None = None) -> np.ndarray:
    """Sum of every row, or of some of its entries."""
    row = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    values = rows.values if chosen is None else rows.values * chosen
    return np.bincount(row, values, rows.n_rows)


def shift_coverage(evidence: Evidence, /) -> np.ndarray:
    """Harm to tokens, with experts counted by the shift itself in place of its root.

    Formula: as ``coverage`` with Z(s) / O(s) in place of its root
    Needs: output norms, shift, tokens
    Direction: higher is kept
    Cost: as ``coverage``
    Source: ours; with p = 1 it is EASY-EP, Dong et al. 2025 (arXiv:2504.06792)
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(turned(_coverage_rows(evidence), evidence)).reshape(evidence.shape)


def whole_coverage(evidence: Evidence, /) -> np.ndarray:
    """Harm to tokens, with what they lose in all layers taken together.

    Formula: as ``output_coverage`` with x_t the share that is gone of Σ_s v_t(s) over all layers
    Needs: output norms, tokens
    Direction: higher is kept
    Cost: as ``coverage``
    Source: ours; what ``coverage`` was before 22 November 2026
    Not defined when: never; an expert without tokens scores 0
    """
    return harm(token_rows(evidence)).reshape(evidence.shape)


def _coverage_rows(evidence: Evidence) -> Rows:
    """What ``coverage`` reads."""
    return by_layer(turned(token_rows(evidence), evidence), evidence)


def _domains(evidence: Evidence) -> np.ndarray:
    """Number of the domain of every sample."""
    place = {domain: at for at, domain in enumerate(evidence.by_domain.domains)}
    return np.array([place[one] for one in evidence.activations.samples()["domain"].to_list()])


def _fitted_sums(evidence: Evidence) -> np.ndarray:
    """Sum of every site over the rows that were fitted."""
    n_sites = evidence.collaboration.n_sites
    return sum(np.bincount(rows.sites, rows.values, n_sites) for rows in fitted_rows(evidence))


def _matrix(rows: Rows):
    """The rows as a SciPy sparse matrix."""
    from scipy.sparse import csr_array

    parts = (rows.values, rows.sites.astype(np.int64), rows.indptr)
    return csr_array(parts, shape=(rows.n_rows, rows.n_sites))


_TOKENS = Needs.OUTPUT_NORMS | Needs.TOKENS
_PATTERNS = _TOKENS | Needs.COLLABORATION
VARIANTS: dict[Callable[[Evidence], np.ndarray], tuple[Needs, bool]] = {
    coverage_3: (_TOKENS | Needs.SHIFT, False),
    pattern_coverage_3: (_PATTERNS, False),
    pattern_coverage_2: (_PATTERNS, False),
    caep_output: (_PATTERNS, True),
    lift: (_PATTERNS, False),
    redundancy: (_PATTERNS | Needs.CHANNELS, False),
    fair_coverage: (_TOKENS | Needs.SHIFT, True),
    fair_patterns: (_PATTERNS, True),
    shift_coverage: (_TOKENS | Needs.SHIFT, False),
    whole_coverage: (_TOKENS, False),
}
"""Every variant with what it needs, and whether it holds for one dropped fraction only."""


def register_variants() -> tuple[str, ...]:
    """The names of all variants, which can be asked for by them from now on."""
    for function, (needs, by_drop) in VARIANTS.items():
        mc.criteria.register(Criterion(function.__name__, needs, function, by_drop=by_drop))
    return tuple(function.__name__ for function in VARIANTS)
