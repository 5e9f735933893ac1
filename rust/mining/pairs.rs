//! Exact counts of all pairs of sites, by adding up bit rows or by going through each row's pairs.

use std::ops::Range;

use super::adder::SITES;
use super::baskets::Baskets;
use super::tally::{Block, Places, ROWS, Tally};
use crate::parallel::Pool;

/// Blocks that are filled before they are counted.
const BATCH: usize = 8;
/// Parts the sites are cut into.
const PARTS: usize = 32;
/// Fewest sites of a part: each part reads all rows.
const PART: usize = 16;

/// How pairs are counted; both give the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// For each site, the sum of the bit rows that hold it: best when rows are full.
    Bits,
    /// Each row's own pairs: best when rows are very sparse.
    Scatter,
}

impl Method {
    /// The cheaper one for these rows.
    pub(super) fn best(baskets: &Baskets) -> Self {
        let n = baskets.n_sites();
        let entries = baskets.n_entries() as f64;
        Self::cheaper((baskets.len(), n), entries, n.div_ceil(part_size(n)))
    }

    /// The cheaper one for so many rows, sites, entries and parts, as if all rows were equally long.
    ///
    /// The costs are nanoseconds, fitted to random rows of 4 to 162 of 64 to 6,144 sites. Going
    /// through pairs wins below about 1 in 250, such as one of 256 experts in each of 12 layers.
    pub(super) fn cheaper((n_rows, n_sites): (usize, usize), entries: f64, n_parts: usize) -> Self {
        let lines = f64::midpoint(n_sites.div_ceil(SITES) as f64, 1.0);
        let lists = (n_rows.div_ceil(ROWS) * n_sites) as f64;
        let bits = entries * (3.0 + 2.5 * lines) + lists * lines * 350.0;
        let length = entries / n_rows.max(1) as f64;
        let scatter = entries * length * 0.7 + (n_rows * n_parts) as f64 * 5.0;
        if bits <= scatter {
            Self::Bits
        } else {
            Self::Scatter
        }
    }
}

/// Sites of a part: tasks of one thread each.
fn part_size(n_sites: usize) -> usize {
    n_sites.div_ceil(PARTS).max(PART)
}

/// Counts of all pairs of sites.
///
/// The upper triangle row by row: (0, 1), (0, 2) … (1, 2) …, as many as n (n − 1) / 2. `watch` is
/// told the share that is done and may stop the work, which then gives nothing.
pub(super) fn count_pairs(
    baskets: &Baskets,
    method: Method,
    pool: &Pool,
    watch: &mut dyn FnMut(f64) -> bool,
) -> Option<Vec<u32>> {
    let n = baskets.n_sites();
    let size = part_size(n);
    let parts = (0..n).step_by(size);
    let mut tallies: Vec<Tally> = parts
        .map(|first| Tally::new(n, first..(first + size).min(n)))
        .collect();
    let mut blocks = Vec::new();
    let batch = BATCH * ROWS;
    for first in (0..baskets.len()).step_by(batch) {
        let rows = first..(first + batch).min(baskets.len());
        let end = rows.end as f64;
        match method {
            Method::Bits => {
                fill(baskets, rows, &mut blocks, pool);
                let all = |tally: &mut Tally| blocks.iter().for_each(|block| tally.add(block));
                pool.parts(&mut tallies, 1, |_, tally| tally.iter_mut().for_each(all));
            }
            Method::Scatter => pool.parts(&mut tallies, 1, |_, tally| {
                for row in rows.clone() {
                    tally[0].add_row(baskets.row(row));
                }
            }),
        }
        if !watch(end / baskets.len() as f64) {
            return None;
        }
    }
    let mut out = Vec::with_capacity(n * n.saturating_sub(1) / 2);
    for tally in tallies {
        tally.append(&mut out);
    }
    Some(out)
}

/// Makes blocks of these rows.
fn fill(baskets: &Baskets, rows: Range<usize>, blocks: &mut Vec<Block>, pool: &Pool) {
    blocks.resize_with(rows.len().div_ceil(ROWS), Block::default);
    let places = Places::new(baskets.n_sites());
    pool.parts(blocks, 1, |at, block| {
        let first = rows.start + at * ROWS;
        let rows = first..(first + ROWS).min(rows.end);
        let sites = rows.clone().map(|row| baskets.row(row).iter().copied());
        block[0].fill(places, rows.len(), sites);
    });
}
