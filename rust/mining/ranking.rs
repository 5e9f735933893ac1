//! Which pairs are kept and in what order, how rare all of them are, and lifts.

use super::sets::Wanted;

/// Pairs that were kept, best first; equals by smaller sites.
pub(super) struct Ranked {
    /// Both sites of each.
    pub site: Vec<u32>,
    /// Places in the upper triangle.
    pub place: Vec<usize>,
}

/// The best of all pairs; `counts` are the upper triangle.
pub(super) fn rank(counts: &[u32], loads: &[u32], n_rows: usize, wanted: Wanted) -> Ranked {
    let lifts = Lifts::new(loads, n_rows);
    let n = loads.len() as u32;
    let mut kept = Vec::with_capacity(counts.len());
    let mut counts = counts.iter();
    for first in 0..n {
        for (second, &count) in (first + 1..n).zip(counts.by_ref()) {
            if count >= wanted.least {
                let score = if wanted.by_lift {
                    lifts.of(count, &[first, second])
                } else {
                    f64::from(count)
                };
                // Numbers of at least 0 ascend like their bits.
                kept.push((!score.to_bits(), first, second));
            }
        }
    }
    if wanted.top < kept.len() {
        kept.select_nth_unstable(wanted.top);
        kept.truncate(wanted.top);
    }
    kept.sort_unstable();
    let place = |first: usize, second: usize| {
        first * (2 * loads.len() - first - 1) / 2 + second - first - 1
    };
    Ranked {
        site: kept.iter().flat_map(|pair| [pair.1, pair.2]).collect(),
        place: kept
            .iter()
            .map(|pair| place(pair.1 as usize, pair.2 as usize))
            .collect(),
    }
}

/// Support over the product of the members' shares of the rows.
pub(super) struct Lifts {
    shares: Vec<f64>,
    n_rows: f64,
}

impl Lifts {
    pub fn new(loads: &[u32], n_rows: usize) -> Self {
        let n_rows = n_rows as f64;
        let shares = loads.iter().map(|&load| f64::from(load) / n_rows);
        Self {
            shares: shares.collect(),
            n_rows,
        }
    }

    /// Lift of a set; 0 if no row holds it.
    pub fn of(&self, count: u32, sites: &[u32]) -> f64 {
        if count == 0 {
            return 0.0;
        }
        let shares = sites.iter().map(|&site| self.shares[site as usize]);
        f64::from(count) / self.n_rows / shares.product::<f64>()
    }
}

/// How many sets have each count.
pub(super) fn histogram(counts: &[u32], n_rows: usize) -> Vec<u64> {
    let mut sets = vec![0; n_rows + 1];
    for &count in counts {
        sets[count as usize] += 1;
    }
    sets
}

/// p adjusted for so many tests (Benjamini and Hochberg 1995), of log10 p of some of them.
///
/// The smallest of p · tests / rank over its own rank and all larger; NaN stays NaN. Of tests that
/// are not among them, none is taken to be smaller.
pub(super) fn adjust(log10_p: &[f64], n_tests: f64) -> Vec<f64> {
    let mut tested: Vec<(f64, usize)> = Vec::with_capacity(log10_p.len());
    tested.extend(log10_p.iter().copied().zip(0..).filter(|p| !p.0.is_nan()));
    tested.sort_unstable_by(|one, two| one.0.total_cmp(&two.0).then(one.1.cmp(&two.1)));
    let mut q = vec![f64::NAN; log10_p.len()];
    let mut least = 0.0_f64;
    for (rank, &(own, at)) in tested.iter().enumerate().rev() {
        least = least.min(own + n_tests.log10() - ((rank + 1) as f64).log10());
        q[at] = 10.0_f64.powf(least);
    }
    q
}

/// Sets of this size that so many sites have.
pub(super) fn n_sets(n_sites: usize, size: usize) -> f64 {
    let factors = (0..size).map(|at| (n_sites as f64 - at as f64) / (at as f64 + 1.0));
    factors.product()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_pairs_by_hand() {
        // Three sites; counts of (0, 1), (0, 2), (1, 2) in ten rows.
        let (counts, loads) = ([2, 2, 4], [2, 8, 5]);
        let best = |least, top, by_lift| {
            let wanted = Wanted {
                size: 2,
                least,
                top,
                by_lift,
            };
            rank(&counts, &loads, 10, wanted).site
        };
        assert_eq!(best(1, 9, false), [1, 2, 0, 1, 0, 2]);
        // Lifts 1.25, 2 and 1.
        assert_eq!(best(1, 9, true), [0, 2, 0, 1, 1, 2]);
        assert_eq!(best(1, 2, true), [0, 2, 0, 1]);
        assert_eq!(best(3, 2, true), [1, 2]);
        assert_eq!(best(1, 0, true), [0_u32; 0]);
        assert_eq!(histogram(&counts, 4), [0, 0, 2, 0, 1]);
    }

    #[test]
    fn p_is_adjusted_by_hand() {
        let p = [0.01_f64, 0.04, f64::NAN, 0.03, 1.0];
        let found = adjust(&p.map(f64::log10), 4.0);
        let expected = [0.04, 0.16 / 3.0, f64::NAN, 0.16 / 3.0, 1.0];
        for (own, one) in found.iter().zip(expected) {
            assert!((own - one).abs() < 1e-12 || own.is_nan() && one.is_nan());
        }
        assert!((n_sets(5, 3) - 10.0).abs() < 1e-12);
    }
}
