//! Exact counts of all pairs of sites, by bit rows or by going through each row's own pairs.

use super::baskets::Baskets;
use super::bitmaps::Bitmaps;
use super::popcount::{self, TILE};
use crate::parallel::Pool;

/// Nanoseconds to count one pair of one row; only for choosing a method.
const SCATTER_COST: f64 = 1.4;

/// How pairs are counted; both give the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Intersections of bit rows: best when rows are full.
    Bits,
    /// Each row's own pairs: best when rows are sparse.
    Scatter,
}

impl Method {
    /// The cheaper one for these rows.
    pub(super) fn best(baskets: &Baskets) -> Self {
        Self::cheaper(baskets.len(), baskets.n_sites(), baskets.n_entries() as f64)
    }

    /// The cheaper one for so many rows, sites and entries, as if all rows were equally long.
    pub(super) fn cheaper(n_rows: usize, n_sites: usize, entries: f64) -> Self {
        let bits = (n_sites as f64).powi(2) / 2.0 * (n_rows as f64 / 64.0) * popcount::cost();
        let length = entries / n_rows.max(1) as f64;
        let scatter = entries * length / 2.0 * SCATTER_COST;
        if bits <= scatter {
            Self::Bits
        } else {
            Self::Scatter
        }
    }
}

/// The same as [`Bitmaps::tile`] from the rows themselves; own counts are left out.
pub(super) fn scatter(baskets: &Baskets, tile: usize, counts: &mut Vec<u32>) {
    let first = (tile * TILE) as u32;
    let rest = baskets.n_sites().next_multiple_of(TILE) - tile * TILE;
    counts.clear();
    counts.resize(TILE * rest, 0);
    for row in 0..baskets.len() {
        let sites = baskets.row(row);
        let from = sites.partition_point(|&site| site < first);
        let own = sites[from..]
            .iter()
            .take_while(|&&site| site < first + TILE as u32);
        for (at, &site) in own.enumerate() {
            let start = (site - first) as usize * rest;
            let line = &mut counts[start..start + rest];
            for &other in &sites[from + at + 1..] {
                line[(other - first) as usize] += 1;
            }
        }
    }
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
    let mut bitmaps = Bitmaps::default();
    if method == Method::Bits {
        bitmaps.fill(baskets);
    }
    let n_tiles = n.div_ceil(TILE);
    let mut out = Vec::with_capacity(n * n.saturating_sub(1) / 2);
    for batch in batches(n_tiles) {
        let parts = pool.map(batch.len(), Vec::new, |counts, at| {
            let tile = batch.start + at;
            match method {
                Method::Bits => bitmaps.tile(tile, counts),
                Method::Scatter => scatter(baskets, tile, counts),
            }
            let mut part = Vec::new();
            append_triangle(&mut part, counts, tile, n);
            part
        });
        for part in parts {
            out.extend(part);
        }
        if !watch(batch.end as f64 / n_tiles as f64) {
            return None;
        }
    }
    Some(out)
}

/// Appends the part of a tile's counts above the diagonal.
pub(super) fn append_triangle(out: &mut Vec<u32>, counts: &[u32], tile: usize, n_sites: usize) {
    let (first, width) = (tile * TILE, counts.len() / TILE);
    for site in first..(first + TILE).min(n_sites) {
        let start = (site - first) * width;
        out.extend_from_slice(&counts[start + site + 1 - first..start + n_sites - first]);
    }
}

/// About 32 ranges that make up 0..n, for progress and for stopping early.
fn batches(n: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = n.div_ceil(32).max(4);
    (0..n)
        .step_by(size)
        .map(move |start| start..(start + size).min(n))
}
