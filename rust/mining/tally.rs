//! Counts of pairs of sites, added up from blocks of rows.

use std::ops::Range;

use super::adder::{self, Line, SITES, WORDS};
use super::columns::Columns;

/// Rows of a block at most: its lines and lists stay in the cache.
pub(super) const ROWS: usize = 8192;

/// Where sites stand in lines: at the end, so that the first line is the one that is not full.
///
/// It is read for few first sites, since counts are wanted of later sites only.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Places {
    n_sites: usize,
    n_lines: usize,
}

impl Places {
    pub fn new(n_sites: usize) -> Self {
        let n_lines = n_sites.div_ceil(SITES).max(1);
        Self { n_sites, n_lines }
    }

    /// The place of the first site.
    fn first(self) -> usize {
        self.n_lines * SITES - self.n_sites
    }
}

/// Some rows, as bits and as lists of the rows that hold each site.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// The first line of every row and an empty one, then the second of every row …
    lines: Vec<Line>,
    n_rows: usize,
    columns: Columns,
}

impl Block {
    /// Takes up other rows, at most `ROWS`, and keeps the memory.
    pub fn fill(
        &mut self,
        places: Places,
        n_rows: usize,
        rows: impl Iterator<Item = impl Iterator<Item = u32>>,
    ) {
        self.n_rows = n_rows;
        self.lines.clear();
        let n_lines = n_rows + 1;
        self.lines.resize(places.n_lines * n_lines, Line::default());
        let first = places.first();
        let mut n_entries = 0;
        for (row, sites) in rows.enumerate() {
            let (mut at, mut word) = (0, 0);
            for site in sites {
                let place = first + site as usize;
                if place / 64 != at {
                    self.lines[at / WORDS * n_lines + row].0[at % WORDS] = word;
                    (at, word) = (place / 64, 0);
                }
                word |= 1 << (place % 64);
                n_entries += 1;
            }
            self.lines[at / WORDS * n_lines + row].0[at % WORDS] = word;
        }
        self.columns.fill(&self.lines, n_lines, first, n_entries);
    }
}

/// Counts of a range of sites with every later one.
#[derive(Debug, Default)]
pub(super) struct Tally {
    places: Places,
    sites: Range<usize>,
    starts: Vec<usize>,
    counts: Vec<u32>,
}

impl Tally {
    pub fn new(n_sites: usize, sites: Range<usize>) -> Self {
        let mut out = Self::default();
        out.reset(n_sites, sites);
        out
    }

    /// Starts anew with these sites and keeps the memory.
    pub fn reset(&mut self, n_sites: usize, sites: Range<usize>) {
        self.places = Places::new(n_sites);
        self.starts.clear();
        self.starts.push(0);
        let mut end = 0;
        for site in sites.clone() {
            end += self.width(site);
            self.starts.push(end);
        }
        self.sites = sites;
        self.counts.clear();
        self.counts.resize(end, 0);
    }

    /// Counts kept of a site: from the word it stands in to the end of the last line.
    fn width(&self, site: usize) -> usize {
        let place = self.places.first() + site;
        self.places.n_lines * SITES - place / 64 * 64
    }

    /// Adds the rows of a block.
    pub fn add(&mut self, block: &Block) {
        let n_lines = block.n_rows + 1;
        for (line, lines) in block.lines.chunks_exact(n_lines).enumerate() {
            let end = (line + 1) * SITES;
            let after = self.places.n_lines * SITES - end;
            for site in self.sites.clone() {
                let list = block.columns.list(site);
                if self.places.first() + site >= end || list.is_empty() {
                    continue;
                }
                let own = site - self.sites.start;
                let stop = self.starts[own + 1] - after;
                let start = self.starts[own].max(stop.saturating_sub(SITES));
                adder::add(list, lines, &mut self.counts[start..stop]);
            }
        }
    }

    /// Adds one row of ascending sites.
    pub fn add_row(&mut self, sites: &[u32]) {
        let range = self.sites.start as u32..self.sites.end as u32;
        let from = sites.partition_point(|&site| site < range.start);
        for (at, &site) in sites.iter().enumerate().skip(from) {
            if site >= range.end {
                break;
            }
            let counts = self.after_mut(site as usize);
            for &other in &sites[at + 1..] {
                counts[(other - site - 1) as usize] += 1;
            }
        }
    }

    /// Counts of a site with each later one.
    pub fn after(&self, site: usize) -> &[u32] {
        &self.counts[self.later(site)]
    }

    /// Appends the counts of all pairs, site by site.
    pub fn append(&self, out: &mut Vec<u32>) {
        for site in self.sites.clone() {
            out.extend_from_slice(self.after(site));
        }
    }

    fn after_mut(&mut self, site: usize) -> &mut [u32] {
        let later = self.later(site);
        &mut self.counts[later]
    }

    fn later(&self, site: usize) -> Range<usize> {
        let end = self.starts[site - self.sites.start + 1];
        end - (self.places.n_sites - site - 1)..end
    }
}
