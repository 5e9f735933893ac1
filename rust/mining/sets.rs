//! Triplets and larger sets above a floor of support, streamed into the best so many.
//!
//! For each first site the rows that hold it are cut to the later sites that meet it often enough;
//! the sets that start with it are then the sets, one smaller, of those rows. At the end stand
//! pairs, counted as in [`super::pairs`].

use std::sync::{Mutex, PoisonError};

use super::baskets::Baskets;
use super::best::{Best, Found, MOST_SITES};
use super::bitmaps::Bitmaps;
use super::pairs::{Method, count_pairs};
use super::ranking::Lifts;
use super::tally::{Block, Places, ROWS, Tally};
use crate::parallel::Pool;

/// Parts of the work after which progress is told.
const BATCHES: f64 = 48.0;
/// A running product of lifts may round to this fraction of the lift itself.
const NEARLY: f64 = 1.0 - 1e-12;

/// What to look for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Sites of a set, 3 to `MOST_SITES`.
    pub size: usize,
    /// Least count, at least 1.
    pub least: u32,
    /// Sets to keep.
    pub top: usize,
    /// Whether the best are those of largest lift, not of largest count.
    pub by_lift: bool,
}

/// The best sets, and how many sets have each count from the floor on.
#[derive(Debug)]
pub(crate) struct Sets {
    pub best: Vec<Found>,
    pub histogram: Vec<u64>,
}

/// Sets of sites that at least `least` rows hold.
///
/// Gives nothing when `watch`, which is told the share done, stops the work.
pub(crate) fn find_sets(
    baskets: &Baskets,
    wanted: Wanted,
    pool: &Pool,
    watch: &mut dyn FnMut(f64) -> bool,
) -> Option<Sets> {
    let search = Search::new(baskets, wanted);
    let names = (0..baskets.n_sites() as u32).collect();
    let counts = count_pairs(baskets, Method::best(baskets), pool, &mut |_| watch(0.0))?;
    let level = Level::new(baskets, names, counts);
    let work = work(&level.loads);
    let all = work[level.loads.len()].max(1.0);
    let mut rest = baskets.clone();
    let mut start = 0;
    while start < level.loads.len() {
        let full = work[start] + all / BATCHES;
        let end = work.partition_point(|&sum| sum <= full) - 1;
        let end = end.max(start + 1);
        // Rows are read again for each of their sites: short ones stay in the cache.
        rest.drop_before(start as u32);
        pool.map(
            end - start,
            || Desk::new(wanted),
            |desk, at| search.first(desk, &rest, &level, start + at),
        );
        if !watch(work[end] / all) {
            return None;
        }
        start = end;
    }
    Some(search.finish())
}

/// Work of all first sites before each, in rough units.
fn work(loads: &[u32]) -> Vec<f64> {
    let mut sum = 0.0;
    let mut out = vec![0.0];
    for (site, &load) in loads.iter().enumerate() {
        sum += f64::from(load) * ((loads.len() - site) as f64).powi(2);
        out.push(sum);
    }
    out
}

/// Rows over the sites that are left.
struct Level {
    /// What the sites are called at the start.
    names: Vec<u32>,
    bitmaps: Bitmaps,
    loads: Vec<u32>,
    /// Counts of all pairs, upper triangle.
    counts: Vec<u32>,
}

impl Level {
    fn new(baskets: &Baskets, names: Vec<u32>, counts: Vec<u32>) -> Self {
        Self {
            names,
            bitmaps: Bitmaps::new(baskets),
            loads: baskets.loads(),
            counts,
        }
    }

    /// Counts of a site with each later one.
    fn after(&self, site: usize) -> &[u32] {
        let n = self.names.len();
        let first = site * (2 * n - site - 1) / 2;
        &self.counts[first..first + n - site - 1]
    }
}

/// Scratch memory of one worker.
struct Desk {
    best: Best,
    histogram: Vec<u32>,
    pairs: Pairs,
}

impl Desk {
    fn new(wanted: Wanted) -> Self {
        Self {
            best: Best::new(wanted.top),
            histogram: Vec::new(),
            pairs: Pairs::default(),
        }
    }
}

/// Counts of pairs of rows that are cut on the way.
#[derive(Default)]
struct Pairs {
    tally: Tally,
    block: Block,
    row: Vec<u32>,
}

impl Pairs {
    /// Counts the pairs of rows over this many sites.
    fn count(
        &mut self,
        (n_rows, n_sites): (usize, usize),
        entries: f64,
        mut rows: impl Iterator<Item = impl Iterator<Item = u32>>,
    ) {
        self.tally.reset(n_sites, 0..n_sites);
        if Method::cheaper((n_rows, n_sites), entries, 1) == Method::Scatter {
            for row in rows {
                self.row.clear();
                self.row.extend(row);
                self.tally.add_row(&self.row);
            }
            return;
        }
        for first in (0..n_rows).step_by(ROWS) {
            let some = ROWS.min(n_rows - first);
            let places = Places::new(n_sites);
            self.block.fill(places, some, rows.by_ref().take(some));
            self.tally.add(&self.block);
        }
    }
}

/// Sites chosen so far, and N^(sites - 1) over the product of their loads.
#[derive(Clone, Copy)]
struct Prefix {
    sites: [u32; MOST_SITES],
    len: usize,
    lift: f64,
}

struct Search {
    wanted: Wanted,
    /// Rows over load of every site.
    inverse: Vec<f64>,
    lifts: Lifts,
    n_rows: usize,
    total: Mutex<Sums>,
}

struct Sums {
    best: Best,
    histogram: Vec<u64>,
}

impl Search {
    fn new(baskets: &Baskets, wanted: Wanted) -> Self {
        let n_rows = baskets.len();
        let loads = baskets.loads();
        let sums = Sums {
            best: Best::new(wanted.top),
            histogram: vec![0; n_rows + 1],
        };
        Self {
            wanted,
            lifts: Lifts::new(&loads, n_rows),
            inverse: loads
                .into_iter()
                .map(|load| n_rows as f64 / f64::from(load))
                .collect(),
            n_rows,
            total: Mutex::new(sums),
        }
    }

    fn finish(self) -> Sets {
        let sums = self.total.into_inner();
        let mut sums = sums.unwrap_or_else(PoisonError::into_inner);
        let few = sums.histogram.iter_mut().take(self.wanted.least as usize);
        few.for_each(|sets| *sets = 0);
        Sets {
            best: sums.best.sorted(),
            histogram: sums.histogram,
        }
    }

    /// Least score that can still enter the best of all.
    fn bar(&self) -> f64 {
        let total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
        total.best.bar()
    }

    /// All sets whose first site is this.
    fn first(&self, desk: &mut Desk, baskets: &Baskets, level: &Level, site: usize) {
        desk.best.raise(self.bar());
        desk.histogram.clear();
        desk.histogram.resize(level.loads[site] as usize + 1, 0);
        let none = Prefix {
            sites: [0; MOST_SITES],
            len: 0,
            lift: 1.0 / self.n_rows as f64,
        };
        self.extend(desk, baskets, level, site, none);
        let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
        total.best.take(&mut desk.best);
        for (sum, &own) in total.histogram.iter_mut().zip(&desk.histogram) {
            *sum += u64::from(own);
        }
    }

    /// All sets that go on with this site.
    fn extend(
        &self,
        desk: &mut Desk,
        baskets: &Baskets,
        level: &Level,
        site: usize,
        mut prefix: Prefix,
    ) {
        let counts = level.after(site);
        let kept = Kept::new(counts, site, self.wanted.least);
        prefix.push(level.names[site], &self.inverse);
        let left = self.wanted.size - prefix.len;
        if kept.sites.len() < left {
            return;
        }
        let names: Vec<u32> = kept.sites.iter().map(|&at| level.names[at]).collect();
        let rows = level.bitmaps.rows(site).map(|row| baskets.row(row));
        let rows = rows.map(|row| kept.cut(row));
        let size = (level.loads[site] as usize, names.len());
        let entries = kept.entries as f64;
        if left == 2 {
            desk.pairs.count(size, entries, rows);
            self.pairs(desk, &names, prefix);
            return;
        }
        let mut cut = Baskets::with_sites(names.len());
        rows.for_each(|row| cut.push(row));
        let whole = (0..cut.len()).map(|row| cut.row(row).iter().copied());
        desk.pairs.count(size, entries, whole);
        let mut counts = Vec::new();
        desk.pairs.tally.append(&mut counts);
        let next = Level::new(&cut, names, counts);
        (0..next.names.len()).for_each(|at| self.extend(desk, &cut, &next, at, prefix));
    }

    /// All sets that end with a pair of the rows on the desk.
    fn pairs(&self, desk: &mut Desk, names: &[u32], prefix: Prefix) {
        let Desk {
            best,
            histogram,
            pairs,
        } = desk;
        for (site, &name) in names.iter().enumerate() {
            let mut prefix = prefix;
            prefix.push(name, &self.inverse);
            let counts = pairs.tally.after(site);
            self.ends((best, histogram), &names[site + 1..], counts, prefix);
        }
    }

    /// The sets that end with each of the last sites.
    fn ends(
        &self,
        (best, histogram): (&mut Best, &mut [u32]),
        names: &[u32],
        counts: &[u32],
        prefix: Prefix,
    ) {
        let Wanted { least, by_lift, .. } = self.wanted;
        let mut bar = best.bar();
        for (&name, &count) in names.iter().zip(counts) {
            histogram[count as usize] += 1;
            let mut score = f64::from(count);
            if by_lift {
                score *= prefix.lift * self.inverse[name as usize];
            }
            if count >= least && score >= bar * NEARLY {
                let mut whole = prefix;
                whole.push(name, &self.inverse);
                let sites = whole.sites;
                if by_lift {
                    score = self.lifts.of(count, &sites[..whole.len]);
                }
                best.offer(Found {
                    score,
                    count,
                    sites,
                });
                bar = best.bar();
            }
        }
    }
}

impl Prefix {
    fn push(&mut self, site: u32, inverse: &[f64]) {
        self.sites[self.len] = site;
        self.len += 1;
        self.lift *= inverse[site as usize];
    }
}

/// No place for this site.
const NONE: u32 = u32::MAX;

/// Later sites that meet a site often enough, and their places among themselves.
struct Kept {
    sites: Vec<usize>,
    places: Vec<u32>,
    first: usize,
    entries: u64,
}

impl Kept {
    fn new(counts: &[u32], site: usize, least: u32) -> Self {
        let mut out = Self {
            sites: Vec::new(),
            places: vec![NONE; counts.len()],
            first: site + 1,
            entries: 0,
        };
        for (at, &count) in counts.iter().enumerate().filter(|each| *each.1 >= least) {
            out.places[at] = out.sites.len() as u32;
            out.sites.push(site + 1 + at);
            out.entries += u64::from(count);
        }
        out
    }

    /// The places of the sites of a row that are kept.
    fn cut(&self, row: &[u32]) -> impl Iterator<Item = u32> {
        let later = row.iter().skip_while(|&&site| (site as usize) < self.first);
        let places = later.map(|&site| self.places[site as usize - self.first]);
        places.filter(|&place| place != NONE)
    }
}
