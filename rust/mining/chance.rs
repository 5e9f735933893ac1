//! What chance gives for every pair: mean and variance of its count, and the tail.
//!
//! Tokens change places at random, independently in each layer, all with all or only within their
//! stratum. Every expert's load and each layer's own tables stay. Between layers a count is then a
//! sum over strata of independent hypergeometric counts, with mean Σ a b / N and variance
//! Σ a b (N − a) (N − b) / (N² (N − 1)) (Mantel and Haenszel 1959); third moments add up alike. Inside a layer, where such an
//! exchange changes nothing, the null is that of [`super::within`]; its variance is that of a
//! two-by-two table with these margins and that mean (Cornfield 1956), times N / (N − 1), with which
//! it is the hypergeometric one where the mean is a b / N.

use super::baskets::Baskets;
use super::strata::{Load, Loads, Strata};
use super::tails::{self, Moments};
use super::within::{Group, expected_pairs};
use crate::parallel::Pool;

/// Chance of all pairs, upper triangles as those of the counts.
#[derive(Debug, Default)]
pub(crate) struct Chance {
    pub mean: Vec<f64>,
    pub variance: Vec<f64>,
    pub log10_p: Vec<f64>,
}

/// Sites of a layer, and which rows may change places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layers<'a> {
    pub n_experts: usize,
    pub strata: &'a Strata,
}

/// Chance of the counts of all pairs (upper triangle).
///
/// Gives nothing when `watch`, which is told the share done, stops the work.
pub(crate) fn chance(
    baskets: &Baskets,
    layers: Layers,
    counts: &[u32],
    pool: &Pool,
    watch: &mut dyn FnMut(f64) -> bool,
) -> Option<Chance> {
    let Layers { n_experts, strata } = layers;
    let n = baskets.n_sites();
    let loads = Loads::new(baskets, strata);
    let judge = Judge {
        loads: &loads,
        n_experts,
        n_sites: n,
        n_rows: baskets.len() as u32,
        exact: (strata.len() == 1).then(|| baskets.loads()),
    };
    let inside = pool.map(
        n / n_experts,
        || (),
        |(), layer| judge.layer(baskets, strata, layer),
    );
    let mut out = Chance::default();
    let size = n.div_ceil(32).max(16);
    for start in (0..n).step_by(size) {
        let rows = pool.map(
            size.min(n - start),
            || (),
            |(), at| judge.row(start + at, &inside[(start + at) / n_experts], counts),
        );
        for row in rows {
            out.mean.extend(row.mean);
            out.variance.extend(row.variance);
            out.log10_p.extend(row.log10_p);
        }
        if !watch((start + size).min(n) as f64 / n as f64) {
            return None;
        }
    }
    Some(out)
}

struct Judge<'a> {
    loads: &'a Loads,
    n_experts: usize,
    n_sites: usize,
    n_rows: u32,
    /// Loads of all sites if there is one stratum, where tails between layers are exact.
    exact: Option<Vec<u32>>,
}

impl Judge<'_> {
    /// Moments of all pairs of one layer, (`n_experts`, `n_experts`).
    fn layer(&self, baskets: &Baskets, strata: &Strata, layer: usize) -> Vec<Moments> {
        let sites = (layer * self.n_experts) as u32..((layer + 1) * self.n_experts) as u32;
        let mut out = vec![Moments::default(); self.n_experts * self.n_experts];
        for stratum in 0..strata.len() {
            let own = self.loads.within(stratum, &sites);
            let loads: Vec<f64> = own.iter().map(|load| load.load).collect();
            let size = self.loads.sizes[stratum];
            let pairs = if size < 2.0 {
                vec![1.0; own.len() * own.len()]
            } else {
                expected_pairs(&loads, &groups(baskets, strata.rows(stratum), &sites))
            };
            for (i, one) in own.iter().enumerate() {
                for (j, two) in own.iter().enumerate().skip(i + 1) {
                    let place = (one.site - sites.start) as usize * self.n_experts;
                    let cell = &mut out[place + (two.site - sites.start) as usize];
                    cell.add(one.load, two.load, size, pairs[i * own.len() + j]);
                }
            }
        }
        out
    }

    /// Chance of the pairs of one site with all later ones.
    fn row(&self, site: usize, inside: &[Moments], counts: &[u32]) -> Chance {
        let layer_end = (site / self.n_experts + 1) * self.n_experts;
        let mut moments = vec![Moments::default(); self.n_sites - site - 1];
        for other in site + 1..layer_end {
            let place = site % self.n_experts * self.n_experts + other % self.n_experts;
            moments[other - site - 1] = inside[place];
        }
        for (own, later) in self.loads.after(site) {
            let from = later.partition_point(|load| (load.site as usize) < layer_end);
            let size = self.loads.sizes[own.stratum as usize];
            for other in &later[from..] {
                moments[other.site as usize - site - 1].exchange(&own, other, size);
            }
        }
        let first = site * (2 * self.n_sites - site - 1) / 2;
        let counts = &counts[first..first + moments.len()];
        let tails = moments.iter().zip(counts).enumerate();
        let log10_p = tails.map(|(at, (own, &count))| match &self.exact {
            Some(loads) if site + 1 + at >= layer_end => {
                tails::hypergeometric(count, self.n_rows, loads[site], loads[site + 1 + at])
            }
            _ => own.tail(count, self.n_rows),
        });
        Chance {
            log10_p: log10_p.collect(),
            mean: moments.iter().map(|own| own.mean).collect(),
            variance: moments.iter().map(|own| own.variance).collect(),
        }
    }
}

impl Moments {
    /// A stratum where two loads meet at random.
    fn exchange(&mut self, one: &Load, two: &Load, size: f64) {
        self.mean += one.load * two.load / size;
        self.variance += one.spread * two.spread;
        self.third += one.skew * two.skew;
        self.forced += (one.load + two.load - size).max(0.0);
    }

    /// A stratum where they meet `mean` times on average.
    fn add(&mut self, one: f64, two: f64, size: f64, mean: f64) {
        let forced = (one + two - size).max(0.0);
        let mean = mean.clamp(forced, one.min(two));
        let cells = [mean, one - mean, two - mean, size - one - two + mean];
        self.mean += mean;
        self.forced += forced;
        if size >= 2.0 && cells.iter().all(|&cell| cell > 1e-9) {
            let [both, first, second, none] = cells.map(|cell| 1.0 / cell);
            let (sum, scale) = (both + first + second + none, size / (size - 1.0));
            let slope = both * both - first * first - second * second + none * none;
            let variance = scale / sum;
            self.variance += variance;
            // How the variance grows with the logarithm of the odds ratio.
            self.third += variance * scale * slope / (sum * sum);
        }
    }

    /// log10 of the probability of a count this large.
    pub fn tail(&self, count: u32, n_rows: u32) -> f64 {
        tails::matched(count, self, f64::from(n_rows))
    }
}

/// How many rows of a stratum hold how many sites of a layer.
fn groups(baskets: &Baskets, rows: &[u32], sites: &std::ops::Range<u32>) -> Vec<Group> {
    let mut found = vec![0.0; sites.len() + 1];
    for &row in rows {
        let row = baskets.row(row as usize);
        let from = row.partition_point(|&site| site < sites.start);
        let to = row.partition_point(|&site| site < sites.end);
        found[to - from] += 1.0;
    }
    found
        .into_iter()
        .enumerate()
        .filter(|group| group.1 > 0.0)
        .collect()
}
