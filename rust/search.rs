//! Where new atoms may be: sets of sites that often stand together in what is left of the rows.

use crate::rng::Rng;
use crate::rows::Entry;
use crate::single::{Leftover, Proposal, Scratch};

/// Rows a search from one seed looks at; more rows only sharpen the counts.
const LOOK: usize = 512;
const LARGEST_SET: usize = 256;
/// A set is no longer enlarged once its area has fallen to this fraction of the largest.
const HOPELESS: f64 = 0.5;

/// Where a search starts: a site, and perhaps a row whose sites it may not leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seed {
    site: u32,
    row: Option<u32>,
}

/// Half of the seeds at the sites with most left, half at rows drawn by what is left of them.
pub(crate) fn seeds(left: &Leftover, n: usize, rng: &mut Rng) -> Vec<Seed> {
    let mut sites: Vec<(f64, u32)> = (0..left.rows.n_sites() as u32)
        .map(|site| {
            (
                mass(left.columns.row(site as usize), |row| left.weight[row]),
                site,
            )
        })
        .filter(|(mass, _)| *mass > 0.0)
        .collect();
    sites.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    sites.truncate(n.div_ceil(2));
    let mut seeds: Vec<Seed> = sites
        .into_iter()
        .map(|(_, site)| Seed { site, row: None })
        .collect();
    let mut sum = 0.0;
    let mut cumulative = Vec::with_capacity(left.rows.len());
    for row in 0..left.rows.len() {
        sum += left.weight[row] * mass(left.rows.row(row), |_| 1.0);
        cumulative.push(sum);
    }
    for _ in 0..if sum > 0.0 { n / 2 } else { 0 } {
        let row = rng.draw(&cumulative);
        let entries = left.rows.row(row);
        if !entries.is_empty() {
            let site = entries[(rng.next() % entries.len() as u64) as usize].index;
            seeds.push(Seed {
                site,
                row: Some(row as u32),
            });
        }
    }
    seeds
}

fn mass(entries: &[Entry], weight: impl Fn(usize) -> f64) -> f64 {
    entries
        .iter()
        .map(|e| weight(e.index as usize) * f64::from(e.value))
        .sum()
}

/// The best atom found from one seed.
pub(crate) fn search(left: &Leftover, scratch: &mut Scratch, seed: Seed) -> Proposal {
    let (majority, tile) = sets(left, scratch, seed);
    let mut best = left.refine(scratch, &majority);
    if tile != majority {
        let found = left.refine(scratch, &tile);
        if found.gain > best.gain {
            best = found;
        }
    }
    best
}

/// Two sets of sites about a seed, over rows that hold it.
///
/// The first: sites present in more than half of the rows. The second: the set with the largest
/// area (sites times rows that hold all of them), grown greedily.
fn sets(left: &Leftover, scratch: &mut Scratch, seed: Seed) -> (Vec<u32>, Vec<u32>) {
    let mut rows = sample(left, seed.site);
    let mut allowed = allowed(left, seed);
    scratch.counts.fill(0.0);
    count(left, scratch, &rows, 1.0);
    let half = 0.5
        * rows
            .iter()
            .map(|&row| left.weight[row as usize])
            .sum::<f64>();
    let often = |site: &u32| scratch.counts[*site as usize] > half;
    let majority = allowed.iter().copied().filter(often).collect();
    let (mut sites, mut best, mut largest) = (vec![seed.site], 1, 0.0);
    while sites.len() < LARGEST_SET && rows.len() > 1 {
        allowed.retain(|&site| scratch.counts[site as usize] > 0.0 && !sites.contains(&site));
        let of = |site: &u32| scratch.counts[*site as usize];
        let Some(&site) = allowed
            .iter()
            .max_by(|a, b| of(a).total_cmp(&of(b)).then(b.cmp(a)))
        else {
            break;
        };
        let area = of(&site) * (sites.len() + 1) as f64;
        if area < HOPELESS * largest {
            break;
        }
        sites.push(site);
        let (stay, go) = rows.iter().partition(|&&row| holds(left, row, site));
        rows = stay;
        count(left, scratch, &go, -1.0);
        if area > largest {
            (largest, best) = (area, sites.len());
        }
    }
    sites.truncate(best);
    sites.sort_unstable();
    (majority, sites)
}

/// Some rows that hold a site, evenly spread.
fn sample(left: &Leftover, site: u32) -> Vec<u32> {
    let rows = left.columns.row(site as usize);
    let stride = rows.len().div_ceil(LOOK).max(1);
    rows.iter()
        .step_by(stride)
        .map(|entry| entry.index)
        .collect()
}

fn holds(left: &Leftover, row: u32, site: u32) -> bool {
    left.rows
        .row(row as usize)
        .binary_search_by_key(&site, |entry| entry.index)
        .is_ok()
}

fn allowed(left: &Leftover, seed: Seed) -> Vec<u32> {
    match seed.row {
        Some(row) => left
            .rows
            .row(row as usize)
            .iter()
            .map(|entry| entry.index)
            .collect(),
        None => (0..left.rows.n_sites() as u32).collect(),
    }
}

/// Adds the weight of the given rows to the count of every site they hold, `sign` times.
fn count(left: &Leftover, scratch: &mut Scratch, rows: &[u32], sign: f64) {
    for &row in rows {
        for entry in left.rows.row(row as usize) {
            scratch.counts[entry.index as usize] += sign * left.weight[row as usize];
        }
    }
}
