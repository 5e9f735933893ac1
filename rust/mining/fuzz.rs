//! Arbitrary input at the doors of mining: an error or counts equal to brute force, never a panic.
//!
//! `PROPTEST_CASES=1000000 cargo test --release mining::fuzz` runs for some minutes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Baskets, MinedSets, MiningParams, count_sets, mine_sets};

/// Any bits, but often ordinary numbers.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => (0_u8..4).prop_map(f32::from),
        1 => any::<u32>().prop_map(f32::from_bits).prop_map(f32::abs),
        1 => any::<u32>().prop_map(f32::from_bits),
    ]
}

#[derive(Debug, Clone)]
struct Arrays {
    indptr: Vec<i64>,
    sites: Vec<u32>,
    values: Vec<f32>,
    n_sites: usize,
}

/// Rows of sorted sites; their values may still be anything.
fn sorted(n_sites: usize, value: impl Strategy<Value = f32>) -> impl Strategy<Value = Arrays> {
    let row = prop::collection::btree_map(0..n_sites as u32, value, 0..9);
    prop::collection::vec(row, 0..40).prop_map(move |rows| {
        let (mut indptr, mut sites, mut values) = (vec![0], vec![], vec![]);
        for row in rows {
            sites.extend(row.keys());
            values.extend(row.values());
            indptr.push(sites.len() as i64);
        }
        Arrays {
            indptr,
            sites,
            values,
            n_sites,
        }
    })
}

fn arrays() -> impl Strategy<Value = Arrays> {
    let anything = (
        prop::collection::vec(prop_oneof![-2_i64..12, any::<i64>()], 0..8),
        prop::collection::vec(prop_oneof![0_u32..9, any::<u32>()], 0..12),
        prop::collection::vec(value(), 0..12),
        0_usize..12,
    )
        .prop_map(|(indptr, sites, values, n_sites)| Arrays {
            indptr,
            sites,
            values,
            n_sites,
        });
    let positive = || (1_u8..4).prop_map(f32::from);
    prop_oneof![
        6 => prop::sample::select(vec![1_usize, 2, 6, 12, 30]).prop_flat_map(move |n| sorted(n, positive())),
        1 => (1_usize..70).prop_flat_map(|n| sorted(n, value())),
        1 => anything,
    ]
}

fn params() -> impl Strategy<Value = MiningParams> {
    let n_experts = prop_oneof![3 => 1_usize..7, 1 => any::<usize>()];
    let size = prop_oneof![9 => 2_usize..6, 1 => any::<usize>()];
    let least = prop_oneof![5 => 0_u32..4, 1 => any::<u32>()];
    let top = prop_oneof![3 => 0_usize..30, 2 => any::<usize>()];
    let flags = (any::<bool>(), any::<bool>(), 1_usize..3);
    (n_experts, size, least, top, flags).prop_map(|(n_experts, size, least, top, flags)| {
        MiningParams {
            n_experts,
            size,
            least,
            top,
            by_lift: flags.0,
            chance: flags.1,
            threads: flags.2,
        }
    })
}

/// Counts of all sets of this size that occur, and of how many rows hold each site.
fn brute(arrays: &Arrays, size: usize) -> (BTreeMap<Vec<u32>, u32>, Vec<u32>) {
    let mut found = BTreeMap::new();
    let mut load = vec![0; arrays.n_sites];
    for bounds in arrays.indptr.windows(2) {
        let range = bounds[0] as usize..bounds[1] as usize;
        let pairs = arrays.sites[range.clone()]
            .iter()
            .zip(&arrays.values[range]);
        let row: Vec<u32> = pairs
            .filter(|pair| *pair.1 > 0.0)
            .map(|pair| *pair.0)
            .collect();
        for subset in 0_u32..1 << row.len() {
            if subset.count_ones() as usize == size {
                let chosen = (0..row.len()).filter(|at| subset >> at & 1 == 1);
                *found.entry(chosen.map(|at| row[at]).collect()).or_insert(0) += 1;
            }
        }
        for &site in &row {
            load[site as usize] += 1;
        }
    }
    (found, load)
}

/// What must hold of any result, beside the counts.
fn sound(found: &MinedSets, params: &MiningParams) -> bool {
    let n = found.count.len();
    let told = if params.chance { n } else { 0 };
    let falls = |values: &[f64]| values.windows(2).all(|pair| pair[0] >= pair[1]);
    let counts: Vec<f64> = found.count.iter().map(|&count| f64::from(count)).collect();
    n <= params.top
        && found.count.iter().all(|&count| count >= params.least)
        && if params.by_lift {
            found
                .lift
                .windows(2)
                .all(|pair| pair[1] <= pair[0] * (1.0 + 1e-9))
        } else {
            falls(&counts)
        }
        && [&found.expected, &found.variance, &found.log10_p, &found.q]
            .iter()
            .all(|part| part.len() == told)
        && found.log10_p.iter().all(|&p| p.is_nan() || p <= 1e-9)
        && found
            .q
            .iter()
            .all(|&q| q.is_nan() || (0.0..=1.0).contains(&q))
        && found.variance.iter().all(|&v| v.is_nan() || v >= 0.0)
}

proptest! {
    #[test]
    fn fuzz_mining(
        arrays in arrays(), params in params(), stop in 0_u32..20,
        strata in prop::option::weighted(0.5, prop::collection::vec(0_u32..4, 0..40)),
        own in any::<bool>(),
    ) {
        let Arrays { indptr, sites, values, n_sites } = &arrays;
        let Ok(baskets) = Baskets::new(indptr, sites, values, *n_sites) else { return Ok(()) };
        // Strata that fit, or any.
        let fitted = strata.map(|mut strata| {
            if own { strata.resize(baskets.len(), 1) }
            strata
        });
        let mut calls = 0;
        let mut watch = |_: &'static str, share: f64| {
            assert!((0.0..=1.0).contains(&share));
            calls += 1;
            stop == 0 || calls != stop
        };
        let Ok(found) = mine_sets(&baskets, fitted.as_deref(), &params, &mut watch) else {
            return Ok(());
        };
        let Some(found) = found else {
            prop_assert_eq!(calls, stop);
            return Ok(());
        };
        let (all, load) = brute(&arrays, params.size);
        prop_assert_eq!(&found.load, &load);
        prop_assert!(sound(&found, &params), "{:?}", found);
        for (set, &count) in found.site.chunks(params.size).zip(&found.count) {
            prop_assert_eq!(all.get(set).copied().unwrap_or(0), count);
            prop_assert!(set.windows(2).all(|pair| pair[0] < pair[1]));
        }
        let enough = all.values().filter(|&&count| count >= params.least.max(1)).count();
        let kept = found.count.iter().filter(|&&count| count > 0).count();
        if params.top > 1_000_000 { prop_assert_eq!(kept, enough) }
        for (count, &sets) in found.histogram.iter().enumerate().skip(params.least.max(1) as usize) {
            let same = all.values().filter(|&&one| one as usize == count).count() as u64;
            prop_assert_eq!(sets, same);
        }
    }

    #[test]
    fn fuzz_counting_given_sets(
        arrays in arrays(), size in 0_usize..5,
        sets in prop::collection::vec(prop_oneof![30 => 0_u32..6, 1 => any::<u32>()], 0..20),
    ) {
        let Arrays { indptr, sites, values, n_sites } = &arrays;
        let Ok(baskets) = Baskets::new(indptr, sites, values, *n_sites) else { return Ok(()) };
        let Ok(counts) = count_sets(&baskets, &sets, size, 1) else { return Ok(()) };
        for (set, count) in sets.chunks(size.max(1)).zip(counts) {
            let mut set = set.to_vec();
            set.sort_unstable();
            set.dedup();
            let all = brute(&arrays, set.len()).0;
            prop_assert_eq!(all.get(&set).copied().unwrap_or(0), count);
        }
    }
}
