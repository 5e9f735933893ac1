//! Contribution-aware expert pruning (CAEP, arXiv:2504.12359, algorithm 1) as a ranking.
//!
//! Instead of stopping at a budget, the loop is run until all atoms are gone, and the step at which
//! each site falls below the fixed threshold is kept; any budget can then be read off the ranking.

use crate::error::{Error, Result};

/// Atoms whose largest code is below this fraction of the largest of all are removed first.
///
/// Differs: our specification says 0.05 for codes of order 1; relative to the largest code the rule
/// also holds for rows of another scale.
const DEAD: f64 = 0.05;

/// When each site falls, and what it contributed just before.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// Removed atoms after which the site is below the threshold: 0 = below from the start, one
    /// more than there are live atoms = never.
    pub step: Vec<i64>,
    /// The site's contribution before it falls; from the start, its contribution at the start.
    pub contribution: Vec<f64>,
}

/// The ranking of all sites.
///
/// `atoms` is row-major (`usage.len()`, `n_sites`), `fraction` the paper's `k_1` in (0, 1]. The
/// threshold is the `ceil(k_1 * n_sites)`-th largest contribution and stays fixed; live atoms go in
/// the order of their use, the smaller id first among equals.
///
/// # Errors
/// Lengths that do not fit, values out of range.
pub fn rank_contributions(
    atoms: &[f32],
    usage: &[f64],
    peak: &[f64],
    fraction: f64,
) -> Result<Ranking> {
    let n_sites = check(atoms, usage, peak, fraction)?;
    let order = removal_order(usage, peak);
    let add = |sums: &mut [f64], atom: usize| {
        let members = &atoms[atom * n_sites..(atom + 1) * n_sites];
        sums.iter_mut()
            .zip(members)
            .for_each(|(sum, &d)| *sum += f64::from(d) * usage[atom]);
    };
    // Summed from the last atom to the first, so that every prefix of the removals is a partial sum
    // and contributions never rise by rounding.
    let mut start = vec![0.0; n_sites];
    order.iter().rev().for_each(|&atom| add(&mut start, atom));
    let threshold = nth_largest(&start, (fraction * n_sites as f64).ceil() as usize);
    let mut step = vec![order.len() as i64 + 1; n_sites];
    let mut contribution = start;
    let mut sums = vec![0.0; n_sites];
    let mut note = |sums: &[f64], n_gone: usize| {
        for site in (0..n_sites).filter(|&site| sums[site] < threshold) {
            step[site] = n_gone as i64;
        }
        for site in 0..n_sites {
            if n_gone as i64 == step[site] - 1 && step[site] <= order.len() as i64 {
                contribution[site] = sums[site];
            }
        }
    };
    note(&sums, order.len());
    for (n_gone, &atom) in order.iter().enumerate().rev() {
        add(&mut sums, atom);
        note(&sums, n_gone);
    }
    Ok(Ranking { step, contribution })
}

/// Live atoms, least used first; among equals the smaller id first.
fn removal_order(usage: &[f64], peak: &[f64]) -> Vec<usize> {
    let least = DEAD * peak.iter().copied().fold(0.0, f64::max);
    let live = |&atom: &usize| peak[atom] > 0.0 && peak[atom] >= least;
    let mut order: Vec<usize> = (0..usage.len()).filter(live).collect();
    order.sort_by(|&a, &b| usage[a].total_cmp(&usage[b]));
    order
}

/// The n-th largest value, n from 1.
fn nth_largest(values: &[f64], n: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    sorted[n.clamp(1, sorted.len()) - 1]
}

/// Checks everything; returns the number of sites.
fn check(atoms: &[f32], usage: &[f64], peak: &[f64], fraction: f64) -> Result<usize> {
    if usage.is_empty() || atoms.is_empty() {
        return Err(Error::Empty { what: "atoms" });
    }
    if peak.len() != usage.len() {
        let (got, expected) = (peak.len(), usage.len());
        return Err(Error::Length {
            what: "peak",
            got,
            expected,
        });
    }
    if !atoms.len().is_multiple_of(usage.len()) {
        let expected = atoms.len() / usage.len() * usage.len();
        return Err(Error::Length {
            what: "atoms",
            got: atoms.len(),
            expected,
        });
    }
    if !(fraction > 0.0 && fraction <= 1.0) {
        let (got, allowed) = (fraction.to_string(), "above 0 and at most 1".into());
        return Err(Error::Setting {
            name: "threshold_fraction",
            got,
            allowed,
        });
    }
    let atoms_wide: Option<usize> = atoms.iter().position(|d| !(0.0..=1.0).contains(d));
    if let Some(position) = atoms_wide {
        let got = atoms[position].to_string();
        return Err(Error::Value {
            what: "atoms",
            got,
            position,
            allowed: "in [0, 1]",
        });
    }
    for (what, values) in [("usage", usage), ("peak", peak)] {
        if let Some(position) = values.iter().position(|v| !v.is_finite() || *v < 0.0) {
            let (got, allowed) = (values[position].to_string(), "finite and not negative");
            return Err(Error::Value {
                what,
                got,
                position,
                allowed,
            });
        }
    }
    Ok(atoms.len() / usage.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_computed() {
        // e = (5+1, 5, 1, 0); k_1 = 0.75 -> f = 1. Atom 1 (use 1) goes first: e = (5, 5, 0, 0).
        let atoms = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0];
        let ranking = rank_contributions(&atoms, &[5.0, 1.0], &[1.0, 1.0], 0.75).unwrap();
        assert_eq!(ranking.step, [2, 2, 1, 0]);
        assert_eq!(ranking.contribution, [5.0, 5.0, 1.0, 0.0]);
    }

    #[test]
    fn dead_atoms_do_not_count() {
        let atoms = [1.0, 0.0, 0.0, 1.0];
        let ranking = rank_contributions(&atoms, &[5.0, 9.0], &[1.0, 0.04], 0.5).unwrap();
        assert_eq!(ranking.step, [1, 0]);
        assert_eq!(ranking.contribution, [5.0, 0.0]);
    }

    #[test]
    fn a_threshold_of_zero_is_never_missed() {
        let ranking = rank_contributions(&[1.0, 0.0], &[2.0], &[1.0], 1.0).unwrap();
        assert_eq!(ranking.step, [2, 2]);
        assert_eq!(ranking.contribution, [2.0, 0.0]);
    }

    #[test]
    fn equal_use_removes_the_smaller_id_first() {
        let atoms = [1.0, 0.0, 0.0, 1.0];
        let ranking = rank_contributions(&atoms, &[2.0, 2.0], &[1.0, 1.0], 1.0).unwrap();
        assert_eq!(ranking.step, [1, 2]);
    }

    #[test]
    fn refuses_bad_input() {
        let rank = |atoms: &[f32], usage: &[f64], peak: &[f64], fraction| {
            rank_contributions(atoms, usage, peak, fraction)
        };
        assert!(matches!(rank(&[], &[], &[], 0.5), Err(Error::Empty { .. })));
        assert!(matches!(
            rank(&[1.0], &[1.0], &[], 0.5),
            Err(Error::Length { .. })
        ));
        assert!(matches!(
            rank(&[1.0; 3], &[1.0; 2], &[1.0; 2], 0.5),
            Err(Error::Length { .. })
        ));
        for fraction in [0.0, 1.1, f64::NAN] {
            assert!(matches!(
                rank(&[1.0], &[1.0], &[1.0], fraction),
                Err(Error::Setting { .. })
            ));
        }
        assert!(matches!(
            rank(&[1.5], &[1.0], &[1.0], 0.5),
            Err(Error::Value { .. })
        ));
        assert!(matches!(
            rank(&[1.0], &[-1.0], &[1.0], 0.5),
            Err(Error::Value { .. })
        ));
        assert!(matches!(
            rank(&[1.0], &[1.0], &[f64::NAN], 0.5),
            Err(Error::Value { .. })
        ));
    }
}
