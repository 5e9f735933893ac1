//! Order in which sites go, each time the one whose going adds least to the damage done to rows.
//!
//! A row of mass `m = sum_s v_s` that has lost the share `x` of it is damaged by `w m x^p`. With
//! `p = 1` damages add up and the order is that of the column sums; with `p > 1` sites that one row
//! needs hurt more together than one each, so that what a site adds only grows while others go
//! (what is kept is monotone submodular). An old value is then a lower bound, and only the smallest
//! is computed anew: the lazy evaluation of Minoux (1978).

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::error::{Error, Result};
use crate::rows::{Entry, Rows};
use crate::step::check_weights;

/// Largest whole power that is computed by products.
const MOST_PRODUCTS: f64 = 16.0;

/// How sites went.
#[derive(Debug, Clone, PartialEq)]
pub struct Departures {
    /// Sites, the first to go first.
    pub order: Vec<u32>,
    /// The damage that each site added when it went, by site; it never falls along the order.
    pub damage: Vec<f64>,
}

/// The order in which all sites go, `weight` and `power` being `w >= 0` of each row and `p >= 1`.
///
/// Of equal sites the larger goes first.
///
/// # Errors
/// Weights that do not fit or are not finite and at least 0, a power below 1, masses that overflow.
pub fn coverage_order(rows: Rows, weight: &[f64], power: f64) -> Result<Departures> {
    let mut damages = Damages::new(rows, weight, power)?;
    let n_sites = damages.columns.len();
    let mut heap: BinaryHeap<Bound> = (0..n_sites as u32)
        .map(|site| Bound {
            damage: damages.added(site),
            site,
            n_gone: 0,
        })
        .collect();
    let mut found = Departures {
        order: Vec::with_capacity(n_sites),
        damage: vec![0.0; n_sites],
    };
    let mut last = 0.0_f64;
    while let Some(mut top) = heap.peek_mut() {
        let n_gone = found.order.len();
        if top.n_gone < n_gone {
            top.damage = top.damage.max(damages.added(top.site));
            top.n_gone = n_gone;
            continue;
        }
        let gone = PeekMut::pop(top);
        damages.remove(gone.site);
        // It falls by rounding only.
        last = last.max(gone.damage);
        found.damage[gone.site as usize] = last;
        found.order.push(gone.site);
    }
    Ok(found)
}

/// What a site adds at least, as computed when `n_gone` sites were gone.
struct Bound {
    damage: f64,
    site: u32,
    n_gone: usize,
}

impl Ord for Bound {
    fn cmp(&self, other: &Self) -> Ordering {
        let least = other.damage.total_cmp(&self.damage);
        least.then(self.site.cmp(&other.site))
    }
}

impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bound {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bound {}

/// One row: the share of its mass that is lost, one over its mass, its weight.
struct Loss {
    share: f64,
    inverse: f64,
    weight: f64,
}

impl Loss {
    /// The lost share before and after an entry goes.
    fn around(&self, entry: Entry) -> (f64, f64) {
        let value = f64::from(entry.value);
        // A share a hair above 1 would be anything to a large power.
        (self.share, (self.share + value * self.inverse).min(1.0))
    }
}

/// Rows by site, and what each row has lost.
struct Damages {
    columns: Rows,
    losses: Vec<Loss>,
    power: f64,
}

impl Damages {
    fn new(rows: Rows, weight: &[f64], power: f64) -> Result<Self> {
        check_weights("weight", weight, rows.len())?;
        check_power(power)?;
        let mass = |row: usize| -> f64 { rows.row(row).iter().map(|e| f64::from(e.value)).sum() };
        let losses: Vec<Loss> = (0..rows.len())
            .map(|row| Loss {
                share: 0.0,
                inverse: 1.0 / mass(row),
                weight: weight[row],
            })
            .collect();
        check_total((0..rows.len()).map(|row| mass(row) * weight[row]).sum())?;
        let columns = rows.columns();
        // Every entry is held once more by now.
        drop(rows);
        Ok(Self {
            columns,
            losses,
            power,
        })
    }

    /// What a site adds if it goes next.
    ///
    /// Sums and products of numbers that never fall as others go, in one order, never fall either:
    /// bounds hold to the last bit.
    fn added(&self, site: u32) -> f64 {
        let whole = self.power.fract() == 0.0 && self.power <= MOST_PRODUCTS;
        match self.power as usize {
            1 if whole => self.sum(site, |_, _| 1.0),
            2 if whole => self.sum(site, |before, after| before + after),
            power if whole => self.sum(site, |before, after| slope(before, after, power)),
            _ => self.sum_powers(site),
        }
    }

    /// Sum of `w v slope(x, x + v / m)`.
    fn sum(&self, site: u32, slope: impl Fn(f64, f64) -> f64) -> f64 {
        let add = |sum: f64, entry: &Entry| {
            let loss = &self.losses[entry.index as usize];
            let (before, after) = loss.around(*entry);
            sum + loss.weight * f64::from(entry.value) * slope(before, after)
        };
        self.columns.row(site as usize).iter().fold(0.0, add)
    }

    /// Sum of `w m ((x + v / m)^p - x^p)`.
    fn sum_powers(&self, site: u32) -> f64 {
        let add = |sum: f64, entry: &Entry| {
            let loss = &self.losses[entry.index as usize];
            let (before, after) = loss.around(*entry);
            let rise = after.powf(self.power) - before.powf(self.power);
            sum + loss.weight / loss.inverse * rise
        };
        self.columns.row(site as usize).iter().fold(0.0, add)
    }

    fn remove(&mut self, site: u32) {
        for entry in self.columns.row(site as usize) {
            let loss = &mut self.losses[entry.index as usize];
            loss.share = loss.around(*entry).1;
        }
    }
}

fn check_power(power: f64) -> Result<()> {
    if (1.0..f64::INFINITY).contains(&power) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "power",
        got: power.to_string(),
        allowed: "finite and at least 1".into(),
    })
}

/// Checks the damage when all sites are gone, with room for the products that lead there.
fn check_total(total: f64) -> Result<()> {
    if (total * MOST_PRODUCTS).is_finite() {
        return Ok(());
    }
    Err(Error::Setting {
        name: "weight",
        got: format!("such that the damages add up to {total}"),
        allowed: "so small that they can be added up".into(),
    })
}

/// `(after^p - before^p) / (after - before)`, without a difference.
fn slope(before: f64, after: f64, power: usize) -> f64 {
    let mut found = 1.0;
    let mut factor = 1.0;
    for _ in 1..power {
        factor *= before;
        found = found * after + factor;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Dense = Vec<Vec<f32>>;

    fn sparse(dense: &Dense) -> Rows {
        let n_sites = dense[0].len();
        let pointers: Vec<i64> = (0..=dense.len())
            .map(|row| (row * n_sites) as i64)
            .collect();
        let sites: Vec<u32> = dense.iter().flat_map(|_| 0..n_sites as u32).collect();
        Rows::new(&pointers, &sites, &dense.concat(), n_sites).unwrap()
    }

    fn order(dense: &Dense, weight: &[f64], power: f64) -> Departures {
        coverage_order(sparse(dense), weight, power).unwrap()
    }

    /// The damage of a set of sites, by the formula.
    fn total(dense: &Dense, weight: &[f64], power: f64, gone: &[u32]) -> f64 {
        let damage = |(row, weight): (&Vec<f32>, &f64)| {
            let mass: f64 = row.iter().copied().map(f64::from).sum();
            let lost: f64 = gone.iter().map(|&site| f64::from(row[site as usize])).sum();
            let share = if mass > 0.0 { lost / mass } else { 0.0 };
            weight * mass * share.powf(power)
        };
        dense.iter().zip(weight).map(damage).sum()
    }

    /// Rows of a few values, weights, and a power.
    fn cases() -> impl Strategy<Value = (Dense, Vec<f64>, f64)> {
        (1_usize..8, 1_usize..8).prop_flat_map(|(n_rows, n_sites)| {
            let value = prop_oneof![2 => Just(0.0_f32), 3 => 0.01_f32..4.0];
            let row = prop::collection::vec(value, n_sites);
            let power = prop_oneof![1.0..5.0, (1_u8..20).prop_map(f64::from)];
            let weight = prop::collection::vec(0.0..3.0, n_rows);
            (prop::collection::vec(row, n_rows), weight, power)
        })
    }

    #[test]
    fn hand_computed() {
        // Masses 4, 3 and 1. At first the sites add 2 * 2 / 4 + 1 * 1 / 3, 2 * 2 / 4, 2 * 2 / 3 and
        // 1: of the two that add 1 the larger goes, then the other. Now site 0 would add
        // (16 - 4) / 4 + 1 / 3; site 2 goes with 4 / 3, and site 0 adds (16 - 4) / 4 + (9 - 4) / 3.
        let dense = vec![
            vec![2.0, 2.0, 0.0, 0.0],
            vec![1.0, 0.0, 2.0, 0.0],
            vec![0.0, 0.0, 0.0, 1.0],
        ];
        let found = order(&dense, &[1.0; 3], 2.0);
        assert_eq!(found.order, [3, 1, 2, 0]);
        let expected = [3.0 + 5.0 / 3.0, 1.0, 4.0 / 3.0, 1.0];
        for (damage, expected) in found.damage.iter().zip(expected) {
            assert!((damage - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn weights_count() {
        let dense = vec![vec![1.0, 0.0], vec![0.0, 2.0]];
        assert_eq!(order(&dense, &[1.0, 1.0], 2.0).order, [0, 1]);
        assert_eq!(order(&dense, &[3.0, 1.0], 2.0).order, [1, 0]);
    }

    #[test]
    fn sites_of_one_row_are_not_lost_together() {
        // By sums, sites 0 and 1 would go first; together they are all that the first row has.
        let dense = vec![vec![1.0, 1.0, 0.0, 0.0], vec![0.0, 0.0, 1.2, 1.2]];
        assert_eq!(order(&dense, &[1.0; 2], 1.0).order, [1, 0, 3, 2]);
        assert_eq!(order(&dense, &[1.0; 2], 2.0).order, [1, 3, 0, 2]);
    }

    #[test]
    fn huge_powers_hurt_when_all_is_lost() {
        let dense = vec![vec![0.5, 4.4e15]];
        let found = order(&dense, &[1.0], 3e18);
        assert_eq!(found.order, [0, 1]);
        assert!(found.damage[0].abs() < 1e-9 && (found.damage[1] / 4.4e15 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn refuses_bad_input() {
        let dense = vec![vec![1.0]];
        let given = |weight: &[f64], power| coverage_order(sparse(&dense), weight, power);
        for power in [0.5, f64::NAN, f64::INFINITY] {
            assert!(matches!(
                given(&[1.0], power),
                Err(Error::Setting { name: "power", .. })
            ));
        }
        assert!(matches!(given(&[], 1.0), Err(Error::Length { .. })));
        assert!(matches!(given(&[-1.0], 1.0), Err(Error::Value { .. })));
        assert!(matches!(
            given(&[f64::MAX], 1.0),
            Err(Error::Setting { name: "weight", .. })
        ));
    }

    proptest! {
        #[test]
        fn every_step_is_the_best_of_all((dense, weight, power) in cases()) {
            let found = order(&dense, &weight, power);
            let mut left: Vec<u32> = (0..dense[0].len() as u32).collect();
            for (at, &site) in found.order.iter().enumerate() {
                let gone = &found.order[..at];
                let before = total(&dense, &weight, power, gone);
                let added = |site: u32| {
                    let after = [gone, &[site]].concat();
                    total(&dense, &weight, power, &after) - before
                };
                let least = left.iter().map(|&other| added(other)).fold(f64::INFINITY, f64::min);
                prop_assert!((added(site) - least).abs() < 1e-9);
                prop_assert!((found.damage[site as usize] - least).abs() < 1e-9);
                left.retain(|&other| other != site);
            }
            prop_assert!(left.is_empty());
        }

        #[test]
        fn damages_never_fall_and_add_up((dense, weight, power) in cases()) {
            let found = order(&dense, &weight, power);
            let along: Vec<f64> = found.order.iter().map(|&s| found.damage[s as usize]).collect();
            prop_assert!(along.windows(2).all(|pair| pair[0] <= pair[1]));
            let all: f64 = dense.iter().zip(&weight).map(|(row, weight)| {
                weight * row.iter().copied().map(f64::from).sum::<f64>()
            }).sum();
            prop_assert!((along.iter().sum::<f64>() - all).abs() < 1e-9);
        }

        #[test]
        fn what_a_site_adds_only_grows((dense, weight, power) in cases()) {
            let whole = power.round().min(MOST_PRODUCTS);
            let mut damages = Damages::new(sparse(&dense), &weight, whole).unwrap();
            let added = |damages: &Damages| -> Vec<f64> {
                (0..dense[0].len() as u32).map(|site| damages.added(site)).collect()
            };
            for site in 0..dense[0].len() as u32 {
                let before = added(&damages);
                damages.remove(site);
                let after = added(&damages);
                prop_assert!(before.iter().zip(&after).all(|(b, a)| b <= a));
            }
        }

        #[test]
        fn powers_of_one_are_column_sums((dense, weight, _) in cases()) {
            let found = order(&dense, &weight, 1.0);
            for (site, damage) in found.damage.iter().enumerate() {
                let sum: f64 = dense.iter().zip(&weight).map(|(row, w)| w * f64::from(row[site])).sum();
                prop_assert_eq!(damage.to_bits(), sum.to_bits());
            }
        }

        #[test]
        fn order_of_rows_and_sites_does_not_matter(
            (dense, weight, power) in cases(), seed in 0_u64..99,
        ) {
            let mut place: Vec<usize> = (0..dense[0].len()).collect();
            let mut rng = crate::rng::Rng::new(seed, 0, 0);
            for at in 1..place.len() {
                place.swap(at, (rng.uniform() * (at + 1) as f64) as usize);
            }
            let relabel = |row: &Vec<f32>| place.iter().map(|&site| row[site]).collect();
            let moved: Dense = dense.iter().rev().map(relabel).collect();
            let back: Vec<f64> = weight.iter().copied().rev().collect();
            let (first, second) = (order(&dense, &weight, power), order(&moved, &back, power));
            for (to, &from) in place.iter().enumerate() {
                prop_assert!((first.damage[from] - second.damage[to]).abs() < 1e-9);
            }
        }
    }
}
