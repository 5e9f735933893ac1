//! Exhaustive mining: exact counts of all pairs and larger sets of sites, and what chance gives.

#![allow(
    clippy::inline_always,
    reason = "vector instructions reach only what is inlined into a dispatched function"
)]

mod adder;
mod baskets;
mod best;
mod bitmaps;
mod chance;
mod columns;
mod pairs;
mod ranking;
mod set_chance;
mod sets;
mod strata;
mod tails;
mod tally;
mod within;

use crate::error::{Error, Result};
use crate::parallel::Pool;

pub use baskets::Baskets;
use best::MOST_SITES;
use chance::Chance;
use pairs::Method;
use ranking::{Lifts, Ranked};
use set_chance::SetChance;
use sets::{Sets, Wanted};
use strata::Strata;

/// What to mine, and on how many threads.
#[derive(Debug, Clone, Copy)]
pub struct MiningParams {
    /// Sites of a layer; layers follow each other.
    pub n_experts: usize,
    /// Sites of a set, in 2 to 6.
    pub size: usize,
    /// Least count of a set, at least 1; pairs may have none.
    pub least: u32,
    /// Sets to keep.
    pub top: usize,
    /// Whether the kept are those of largest lift, not of largest count.
    pub by_lift: bool,
    /// Whether to say what chance gives; if not, that part is empty.
    pub chance: bool,
    /// Threads; one per processor if 0.
    pub threads: usize,
}

/// The best sets, best first, and how many of all have each count.
#[derive(Debug, Clone)]
pub struct MinedSets {
    /// Sites of each set, one after the other.
    pub site: Vec<u32>,
    /// Rows that hold all sites.
    pub count: Vec<u32>,
    /// Rows that hold each site.
    pub load: Vec<u32>,
    /// Support over the product of the sites' shares of the rows.
    pub lift: Vec<f64>,
    /// Number of sets by count; of larger sets than pairs, 0 below the floor.
    pub histogram: Vec<u64>,
    /// Mean count under the null; NaN for larger sets inside one layer, like the three below.
    pub expected: Vec<f64>,
    /// Variance of the count under the null.
    pub variance: Vec<f64>,
    /// log10 of the probability of a count this large under the null.
    pub log10_p: Vec<f64>,
    /// This probability adjusted for all sets of this size (Benjamini and Hochberg).
    pub q: Vec<f64>,
}

/// Told the stage and the share of it that is done; false stops the work.
pub type Watch<'a> = dyn FnMut(&'static str, f64) -> bool + 'a;

/// The best sets of sites, with what chance gives; nothing if `watch` stopped it.
///
/// Chance lets rows change places within strata (all with all if none are given).
///
/// # Errors
/// Layers, strata or settings that do not fit; threads that cannot be started.
pub fn mine_sets(
    baskets: &Baskets,
    strata: Option<&[u32]>,
    params: &MiningParams,
    watch: &mut Watch,
) -> Result<Option<MinedSets>> {
    let strata = check(baskets, strata, params)?;
    let search = Search {
        baskets,
        layers: chance::Layers {
            n_experts: params.n_experts,
            strata: &strata,
        },
        wanted: Wanted {
            size: params.size,
            least: params.least,
            top: params.top,
            by_lift: params.by_lift,
        },
        chance: params.chance,
        pool: Pool::new(params.threads)?,
    };
    Ok(if params.size == 2 {
        search.pairs(watch)
    } else {
        search.larger(watch)
    })
}

struct Search<'a> {
    baskets: &'a Baskets<'a>,
    layers: chance::Layers<'a>,
    wanted: Wanted,
    chance: bool,
    pool: Pool,
}

impl Search<'_> {
    /// All pairs are counted and judged, then the best are kept.
    fn pairs(&self, watch: &mut Watch) -> Option<MinedSets> {
        let (baskets, pool) = (self.baskets, &self.pool);
        let method = Method::best(baskets);
        let counts = pairs::count_pairs(baskets, method, pool, &mut |done| watch("count", done))?;
        let mut told = |done| watch("chance", done);
        let found = if self.chance {
            chance::chance(baskets, self.layers, &counts, pool, &mut told)?
        } else {
            Chance::default()
        };
        let load = baskets.loads();
        let Ranked { site, place } = ranking::rank(&counts, &load, baskets.len(), self.wanted);
        let q = ranking::adjust(&found.log10_p, counts.len() as f64);
        let kept = |all: &[f64]| match all {
            [] => Vec::new(),
            all => place.iter().map(|&at| all[at]).collect(),
        };
        let count: Vec<u32> = place.iter().map(|&at| counts[at]).collect();
        Some(MinedSets {
            lift: self.lifts(&site, &count, &load),
            site,
            count,
            load,
            histogram: ranking::histogram(&counts, baskets.len()),
            expected: kept(&found.mean),
            variance: kept(&found.variance),
            log10_p: kept(&found.log10_p),
            q: kept(&q),
        })
    }

    /// The best are kept on the way; then they are judged.
    fn larger(&self, watch: &mut Watch) -> Option<MinedSets> {
        let (baskets, size) = (self.baskets, self.wanted.size);
        let mut told = |done| watch("count", done);
        let Sets { best, histogram } =
            sets::find_sets(baskets, self.wanted, &self.pool, &mut told)?;
        let judged = if self.chance { &best[..] } else { &[] };
        let chance = set_chance::set_chance(baskets, self.layers, (judged, size), &self.pool);
        let part = |part: fn(&SetChance) -> f64| chance.iter().map(part).collect::<Vec<f64>>();
        let sites = best.iter().flat_map(|found| &found.sites[..size]);
        let site: Vec<u32> = sites.copied().collect();
        let count: Vec<u32> = best.iter().map(|found| found.count).collect();
        let log10_p = part(|own| own.log10_p);
        let load = baskets.loads();
        Some(MinedSets {
            lift: self.lifts(&site, &count, &load),
            site,
            count,
            load,
            histogram,
            expected: part(|own| own.mean),
            variance: part(|own| own.variance),
            // Ranks among the kept are at most those among all sets, so q is never too small.
            q: ranking::adjust(&log10_p, ranking::n_sets(baskets.n_sites(), size)),
            log10_p,
        })
    }

    fn lifts(&self, site: &[u32], count: &[u32], load: &[u32]) -> Vec<f64> {
        let lifts = Lifts::new(load, self.baskets.len());
        let sets = site.chunks_exact(self.wanted.size).zip(count);
        sets.map(|(sites, &count)| lifts.of(count, sites)).collect()
    }
}

/// How many rows hold all sites of each set of this size.
///
/// # Errors
/// Sites out of range; threads that cannot be started.
pub fn count_sets(
    baskets: &Baskets,
    sets: &[u32],
    size: usize,
    threads: usize,
) -> Result<Vec<u32>> {
    let n_sites = baskets.n_sites();
    if let Some(position) = sets.iter().position(|&site| site as usize >= n_sites) {
        return Err(Error::Value {
            what: "sets",
            got: sets[position].to_string(),
            position,
            allowed: "below n_sites",
        });
    }
    let pool = Pool::new(threads)?;
    Ok(set_chance::count_sets(baskets, sets, size.max(1), &pool))
}

/// The strata, if everything fits.
fn check(baskets: &Baskets, strata: Option<&[u32]>, params: &MiningParams) -> Result<Strata> {
    let whole = |name, got: usize, allowed| {
        let got = got.to_string();
        Err(Error::Setting { name, got, allowed })
    };
    let (n_sites, n_experts) = (baskets.n_sites(), params.n_experts);
    if n_experts == 0 || !n_sites.is_multiple_of(n_experts) {
        let allowed = format!("a divisor of the {n_sites} sites");
        return whole("n_experts", n_experts, allowed);
    }
    if !(2..=MOST_SITES).contains(&params.size) {
        return whole("size", params.size, format!("in 2 to {MOST_SITES}"));
    }
    if params.least == 0 && params.size > 2 {
        return whole("least", 0, "at least 1".to_owned());
    }
    match strata {
        None => Ok(Strata::whole(baskets.len())),
        Some(numbers) if numbers.len() == baskets.len() => Ok(Strata::by(numbers)),
        Some(numbers) => Err(Error::Length {
            what: "strata",
            got: numbers.len(),
            expected: baskets.len(),
        }),
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
