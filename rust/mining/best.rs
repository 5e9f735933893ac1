//! The best so many sets of a stream, in bounded memory.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

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

/// Keeps the best `limit`; the result does not depend on the order they come in.
#[derive(Debug, Clone)]
pub(super) struct Best {
    limit: usize,
    heap: BinaryHeap<Reverse<Found>>,
}

impl Best {
    pub fn new(limit: usize) -> Self {
        let heap = BinaryHeap::new();
        Self { limit, heap }
    }

    /// Least score that can still enter.
    pub fn bar(&self) -> f64 {
        match self.heap.peek() {
            Some(worst) if self.heap.len() >= self.limit => worst.0.score,
            _ => f64::NEG_INFINITY,
        }
    }

    pub fn offer(&mut self, found: Found) {
        if self.heap.len() < self.limit {
            self.heap.push(Reverse(found));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && found > worst.0
        {
            *worst = Reverse(found);
        }
    }

    /// Takes up all that another holds, which is empty then.
    pub fn take(&mut self, other: &mut Self) {
        other.heap.drain().for_each(|found| self.offer(found.0));
    }

    /// Best first.
    pub fn sorted(self) -> Vec<Found> {
        self.heap
            .into_sorted_vec()
            .into_iter()
            .map(|found| found.0)
            .collect()
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
}
