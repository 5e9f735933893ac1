//! The best so many sets of a stream, in bounded memory.

use std::cmp::Ordering;

/// Largest size of a set.
pub(crate) const MOST_SITES: usize = 6;

/// A set of sites with its count; unused places hold 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Found {
    pub score: f64,
    pub count: u32,
    pub sites: [u32; MOST_SITES],
}

impl Eq for Found {}

impl Ord for Found {
    /// The better is greater: higher score, then smaller sites.
    fn cmp(&self, other: &Self) -> Ordering {
        let scores = self.score.total_cmp(&other.score);
        scores.then_with(|| other.sites.cmp(&self.sites))
    }
}

impl PartialOrd for Found {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Fewest sets between two cuts.
const SLACK: usize = 1024;

/// Keeps the best `limit`; the result does not depend on the order they come in.
///
/// Up to twice as many are held and cut back to the best at once, which costs a few steps a set
/// where a heap takes as many as its depth.
#[derive(Debug, Clone)]
pub(super) struct Best {
    limit: usize,
    found: Vec<Found>,
    bar: f64,
}

impl Best {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            found: Vec::new(),
            bar: f64::NEG_INFINITY,
        }
    }

    /// Least score that can still enter.
    pub fn bar(&self) -> f64 {
        self.bar
    }

    /// Leaves out what scores less, which others are known to surpass.
    pub fn raise(&mut self, bar: f64) {
        self.bar = self.bar.max(bar);
    }

    pub fn offer(&mut self, found: Found) {
        if found.score < self.bar {
            return;
        }
        self.found.push(found);
        if self.found.len() >= self.limit.saturating_mul(2).max(SLACK) {
            self.cut();
        }
    }

    /// Keeps the best only, and raises the bar to the worst of them.
    fn cut(&mut self) {
        if self.limit == 0 || self.found.len() < self.limit {
            self.found.truncate(self.limit);
            return;
        }
        let last = self.limit - 1;
        let (_, worst, _) = self
            .found
            .select_nth_unstable_by(last, |one, two| two.cmp(one));
        self.bar = worst.score;
        self.found.truncate(self.limit);
    }

    /// Takes up all that another holds, which is as new then.
    pub fn take(&mut self, other: &mut Self) {
        other.found.drain(..).for_each(|found| self.offer(found));
        other.bar = f64::NEG_INFINITY;
    }

    /// Best first.
    pub fn sorted(mut self) -> Vec<Found> {
        self.cut();
        self.found.sort_unstable_by(|one, two| two.cmp(one));
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(score: f64, site: u32) -> Found {
        Found {
            score,
            count: 1,
            sites: [site, 0, 0, 0, 0, 0],
        }
    }

    #[test]
    fn keeps_the_best_in_any_order() {
        let mut all: Vec<Found> = (0..50).map(|at| found(f64::from(at % 7), at)).collect();
        let keep = |all: &[Found]| {
            let mut best = Best::new(10);
            best.raise(1.0);
            for &one in all {
                best.offer(one);
            }
            best.sorted()
        };
        let first = keep(&all);
        all.reverse();
        assert_eq!(first, keep(&all));
        let sites: Vec<u32> = first.iter().map(|one| one.sites[0]).collect();
        assert_eq!(sites, [6, 13, 20, 27, 34, 41, 48, 5, 12, 19]);
    }

    #[test]
    fn many_are_cut_back_to_the_first_of_all() {
        let all: Vec<Found> = (0..9000_u32)
            .map(|at| found(f64::from(at * 7919 % 1000), at))
            .collect();
        let mut expected = all.clone();
        expected.sort_by(|one, two| two.cmp(one));
        for limit in [0, 1, 3, 700, 9000, 10_000, usize::MAX] {
            let (mut best, mut part) = (Best::new(limit), Best::new(limit));
            for some in all.chunks(1300) {
                part.raise(best.bar());
                for &one in some {
                    part.offer(one);
                }
                best.take(&mut part);
            }
            assert_eq!(best.sorted(), expected[..limit.min(9000)]);
        }
    }
}
