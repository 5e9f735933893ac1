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
use set_chance::SetChance;
use sets::{Sets, Wanted};
use strata::Strata;

/// What to mine, and on how many threads.
#[derive(Debug, Clone, Copy)]
pub struct MiningParams {
    /// Sites of a layer; layers follow each other.
    pub n_experts: usize,
    /// Sites of a set, in 2 to 6; pairs have functions of their own.
    pub size: usize,
    /// Least count of a set, at least 1.
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

/// Counts of all pairs and what chance gives, as upper triangles row by row.
#[derive(Debug, Clone)]
pub struct MinedPairs {
    /// Rows that hold both sites.
    pub count: Vec<u32>,
    /// Rows that hold each site.
    pub load: Vec<u32>,
    /// Mean count under the null.
    pub expected: Vec<f64>,
    /// Variance of the count under the null.
    pub variance: Vec<f64>,
    /// log10 of the probability of a count this large under the null.
    pub log10_p: Vec<f64>,
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
    /// Number of sets by count; 0 below the floor.
    pub histogram: Vec<u64>,
    /// Mean count under the null; NaN for sets inside one layer, like the two below.
    pub expected: Vec<f64>,
    /// Variance of the count under the null.
    pub variance: Vec<f64>,
    /// log10 of the probability of a count this large under the null.
    pub log10_p: Vec<f64>,
}

/// Told the stage and the share of it that is done; false stops the work.
pub type Watch<'a> = dyn FnMut(&'static str, f64) -> bool + 'a;

/// Exact counts of all pairs of sites, with what chance gives; nothing if `watch` stopped it.
///
/// Chance lets rows change places within strata (all with all if none are given).
///
/// # Errors
/// Layers or strata that do not fit the rows; threads that cannot be started.
pub fn mine_pairs(
    baskets: &Baskets,
    strata: Option<&[u32]>,
    params: &MiningParams,
    watch: &mut Watch,
) -> Result<Option<MinedPairs>> {
    let strata = check(baskets, strata, params)?;
    let pool = Pool::new(params.threads)?;
    let method = Method::best(baskets);
    let counts = pairs::count_pairs(baskets, method, &pool, &mut |share| watch("count", share));
    let Some(count) = counts else {
        return Ok(None);
    };
    let layers = chance::Layers {
        n_experts: params.n_experts,
        strata: &strata,
    };
    let mut told = |share| watch("chance", share);
    let found = if params.chance {
        chance::chance(baskets, layers, &count, &pool, &mut told)
    } else {
        Some(Chance::default())
    };
    let load = baskets.loads();
    Ok(found.map(|found: Chance| MinedPairs {
        count,
        load,
        expected: found.mean,
        variance: found.variance,
        log10_p: found.log10_p,
    }))
}

/// The best larger sets of sites, with what chance gives; nothing if `watch` stopped it.
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
    let pool = Pool::new(params.threads)?;
    let wanted = Wanted {
        size: params.size,
        least: params.least,
        top: params.top,
        by_lift: params.by_lift,
    };
    let found = sets::find_sets(baskets, wanted, &pool, &mut |share| watch("count", share));
    let Some(Sets { best, histogram }) = found else {
        return Ok(None);
    };
    let layers = chance::Layers {
        n_experts: params.n_experts,
        strata: &strata,
    };
    let judged = if params.chance { &best[..] } else { &[] };
    let chance = set_chance::set_chance(baskets, layers, (judged, params.size), &pool);
    let part = |part: fn(&SetChance) -> f64| chance.iter().map(part).collect();
    let sites = best.iter().flat_map(|found| &found.sites[..params.size]);
    Ok(Some(MinedSets {
        site: sites.copied().collect(),
        count: best.iter().map(|found| found.count).collect(),
        load: baskets.loads(),
        histogram,
        expected: part(|own| own.mean),
        variance: part(|own| own.variance),
        log10_p: part(|own| own.log10_p),
    }))
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
    if params.least == 0 {
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
mod tests;
