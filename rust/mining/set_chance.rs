//! What chance gives for sets of three and more sites: layers change places, tables stay.
//!
//! The members of a set that share a layer act as one: the rows that hold all of them. Two such
//! groups meet as a pair does. For more, the mean is Σ N Π (m / N) over strata, and the variance
//! follows from E\[X²\] = N Π (m / N) + N (N − 1) Π (m (m − 1) / (N (N − 1))). A set inside one layer
//! has no chance of its own: the exchange never changes its count.

use super::baskets::Baskets;
use super::best::Found;
use super::bitmaps::{Bitmaps, ones};
use super::chance::{Layers, Moments};
use super::tails;
use crate::parallel::Pool;

/// Mean and variance of the count by chance, and log10 of its tail; NaN where there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SetChance {
    pub mean: f64,
    pub variance: f64,
    pub log10_p: f64,
}

/// Chance of each of these sets of `size` sites.
pub(crate) fn set_chance(
    baskets: &Baskets,
    layers: Layers,
    (sets, size): (&[Found], usize),
    pool: &Pool,
) -> Vec<SetChance> {
    let mut bitmaps = Bitmaps::default();
    bitmaps.fill(baskets);
    let (stratum, sizes) = layers.strata.numbers();
    let judge = Judge {
        bitmaps,
        stratum,
        sizes,
        n_experts: layers.n_experts as u32,
    };
    pool.map(sets.len(), Vec::new, |loads, at| {
        judge.set(loads, &sets[at].sites[..size], sets[at].count)
    })
}

/// How many rows hold all sites of each set.
pub(crate) fn count_sets(baskets: &Baskets, sets: &[u32], size: usize, pool: &Pool) -> Vec<u32> {
    let mut bitmaps = Bitmaps::default();
    bitmaps.fill(baskets);
    let sets: Vec<&[u32]> = sets.chunks(size).collect();
    pool.map(
        sets.len(),
        || (),
        |(), at| {
            bitmaps
                .common(sets[at])
                .map(|(_, word)| word.count_ones())
                .sum()
        },
    )
}

struct Judge {
    bitmaps: Bitmaps,
    stratum: Vec<u32>,
    sizes: Vec<f64>,
    n_experts: u32,
}

impl Judge {
    fn set(&self, loads: &mut Vec<f64>, sites: &[u32], count: u32) -> SetChance {
        let one_layer = |a: &u32, b: &u32| a / self.n_experts == b / self.n_experts;
        let groups: Vec<&[u32]> = sites.chunk_by(one_layer).collect();
        if groups.len() == 1 {
            let none = f64::NAN;
            return SetChance {
                mean: none,
                variance: none,
                log10_p: none,
            };
        }
        let n_strata = self.sizes.len();
        loads.clear();
        loads.resize(n_strata * groups.len(), 0.0);
        for (group, own) in groups.iter().zip(loads.chunks_mut(n_strata)) {
            self.add_loads(group, own);
        }
        let n_rows = self.stratum.len() as u32;
        let moments = self.moments(loads);
        let log10_p = if n_strata == 1 && groups.len() == 2 {
            tails::hypergeometric(count, n_rows, loads[0] as u32, loads[1] as u32)
        } else {
            moments.tail(count, n_rows)
        };
        SetChance {
            mean: moments.mean,
            variance: moments.variance,
            log10_p,
        }
    }

    /// Rows of every stratum that hold all these sites.
    fn add_loads(&self, sites: &[u32], loads: &mut [f64]) {
        for (first, word) in self.bitmaps.common(sites) {
            if loads.len() == 1 {
                loads[0] += f64::from(word.count_ones());
            } else {
                ones(word).for_each(|bit| loads[self.stratum[first + bit] as usize] += 1.0);
            }
        }
    }

    /// Sum of the strata's moments; `loads` are (groups, strata).
    fn moments(&self, loads: &[f64]) -> Moments {
        let n_strata = self.sizes.len();
        let n_groups = (loads.len() / n_strata) as f64;
        let mut out = Moments::default();
        for (stratum, &size) in self.sizes.iter().enumerate() {
            let own = || loads[stratum..].iter().step_by(n_strata);
            if own().any(|&load| load == 0.0) {
                continue;
            }
            let mean = size * own().map(|load| load / size).product::<f64>();
            out.mean += mean;
            out.forced += (own().sum::<f64>() - (n_groups - 1.0) * size).max(0.0);
            if size > 1.0 {
                let share = own().map(|load| load * (load - 1.0) / (size * (size - 1.0)));
                let pairs = size * (size - 1.0) * share.product::<f64>();
                out.variance += (mean + pairs - mean * mean).max(0.0);
            }
        }
        out
    }
}
