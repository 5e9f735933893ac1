//! What chance gives for sets of three and more sites: layers change places, tables stay.
//!
//! The members of a set that share a layer act as one: the rows that hold all of them. Two such
//! groups meet as a pair does. For more, the mean is Σ N Π (m / N) over strata, and higher moments
//! follow from the factorial ones, such as E\[X (X − 1)\] = N (N − 1) Π (m (m − 1) / (N (N − 1)));
//! the tail is that of a binomial with these moments. A set inside one layer has no chance of its
//! own: the exchange never changes its count.

use super::baskets::Baskets;
use super::best::Found;
use super::bitmaps::{Bitmaps, ones};
use super::chance::Layers;
use super::tails::{self, Moments};
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
    let bitmaps = Bitmaps::new(baskets);
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
    let bitmaps = Bitmaps::new(baskets);
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
            // Means of X, X (X - 1) and X (X - 1) (X - 2).
            let falling = |load: f64, power: i32| -> f64 {
                (0..power)
                    .map(|step| (load - f64::from(step)).max(0.0))
                    .product()
            };
            let factorial = |power: i32| -> f64 {
                let all = falling(size, power);
                let share = own().map(|&load| falling(load, power) / all);
                if all > 0.0 {
                    all * share.product::<f64>()
                } else {
                    0.0
                }
            };
            let [mean, second, third] = [1, 2, 3].map(factorial);
            let variance = (second + mean - mean * mean).max(0.0);
            out.mean += mean;
            out.variance += variance;
            let cube = third + 3.0 * second + mean;
            out.third += cube - 3.0 * mean * variance - mean.powi(3);
            out.forced += (own().sum::<f64>() - (n_groups - 1.0) * size).max(0.0);
        }
        out
    }
}
