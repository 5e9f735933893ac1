use super::best::Found;
use super::chance::{Layers, chance};
use super::pairs::count_pairs;
use super::set_chance::{count_sets, set_chance};
use super::sets::find_sets;
use super::{Baskets, Method, Sets, Strata, Wanted};
use crate::parallel::Pool;
use crate::rng::Rng;
use proptest::prelude::*;
use std::collections::BTreeSet;

type Sparse = Vec<BTreeSet<u32>>;

fn baskets(rows: &Sparse, n_sites: usize) -> Baskets<'static> {
    let mut out = Baskets::with_sites(n_sites);
    for row in rows {
        out.push(row.iter().copied());
    }
    out
}

fn whole(n_experts: usize, strata: &Strata) -> Layers<'_> {
    Layers { n_experts, strata }
}

fn rows(n_sites: u32, most: usize, n_rows: usize) -> impl Strategy<Value = Sparse> {
    let row = prop::collection::btree_set(0..n_sites, 0..most);
    prop::collection::vec(row, 1..n_rows)
}

fn brute(rows: &Sparse, set: &[u32]) -> u32 {
    rows.iter()
        .filter(|row| set.iter().all(|site| row.contains(site)))
        .count() as u32
}

fn combinations(n: u32, size: usize) -> Vec<Vec<u32>> {
    if size == 0 {
        return vec![Vec::new()];
    }
    let shorter = combinations(n, size - 1);
    let grown = shorter.iter().flat_map(|set| {
        let first = set.last().map_or(0, |last| last + 1);
        (first..n).map(move |site| [&set[..], &[site]].concat())
    });
    grown.collect()
}

fn found(rows: &Sparse, n_sites: usize, wanted: Wanted, threads: usize) -> Sets {
    let pool = Pool::new(threads).unwrap();
    find_sets(&baskets(rows, n_sites), wanted, &pool, &mut |_| true).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn pairs_equal_brute_force(rows in rows(37, 20, 200)) {
        let expected: Vec<u32> = combinations(37, 2).iter().map(|set| brute(&rows, set)).collect();
        for (threads, method) in [(1, Method::Bits), (3, Method::Bits), (2, Method::Scatter)] {
            let pool = Pool::new(threads).unwrap();
            let counts = count_pairs(&baskets(&rows, 37), method, &pool, &mut |_| true);
            prop_assert_eq!(counts.as_ref(), Some(&expected));
        }
    }

    #[test]
    fn larger_sets_equal_brute_force(
        rows in rows(18, 12, 80), size in 3_usize..=5, least in 1_u32..6, by_lift in any::<bool>(),
    ) {
        let mut all: Vec<(u32, Vec<u32>)> = combinations(18, size).into_iter()
            .map(|set| (brute(&rows, &set), set)).filter(|one| one.0 >= least).collect();
        let wanted = Wanted { size, least, top: usize::MAX, by_lift };
        let sets = found(&rows, 18, wanted, 2);
        let mut got: Vec<(u32, Vec<u32>)> =
            sets.best.iter().map(|one| (one.count, one.sites[..size].to_vec())).collect();
        got.sort();
        all.sort();
        prop_assert_eq!(&got, &all);
        prop_assert_eq!(sets.histogram.iter().sum::<u64>() as usize, all.len());
        for (count, sets) in sets.histogram.iter().enumerate() {
            let same = all.iter().filter(|one| one.0 as usize == count).count();
            prop_assert_eq!(*sets as usize, same);
        }
    }

    #[test]
    fn the_kept_are_the_first_of_all(rows in rows(20, 14, 60), by_lift in any::<bool>()) {
        let wanted = |top| Wanted { size: 3, least: 1, top, by_lift };
        let all = found(&rows, 20, wanted(usize::MAX), 1).best;
        for (threads, top) in [(1, 10), (3, 10), (2, 1)] {
            let some = found(&rows, 20, wanted(top), threads).best;
            prop_assert_eq!(&some[..], &all[..top.min(all.len())]);
        }
        prop_assert!(all.windows(2).all(|pair| pair[0].score >= pair[1].score));
    }

    #[test]
    fn given_sets_equal_brute_force(rows in rows(15, 9, 100)) {
        let sets = combinations(15, 3);
        let pool = Pool::new(2).unwrap();
        let counts = count_sets(&baskets(&rows, 15), &sets.concat(), 3, &pool);
        let expected: Vec<u32> = sets.iter().map(|set| brute(&rows, set)).collect();
        prop_assert_eq!(counts, expected);
    }
}

#[test]
fn odd_sizes_equal_brute_force() {
    let mut rng = Rng::new(1, 0, 0);
    for n_sites in [1_usize, 2, 63, 64, 65, 511, 512, 513, 1030] {
        for n_rows in [0, 1, 255, 256] {
            let rows: Vec<Vec<u32>> = (0..n_rows)
                .map(|_| {
                    let few = rng.next() as usize % 12;
                    rng.distinct(n_sites, few)
                })
                .collect();
            let mut expected = vec![0; n_sites * n_sites];
            let mut baskets = Baskets::with_sites(n_sites);
            for row in &rows {
                baskets.push(row.iter().copied());
                for &one in row {
                    for &two in row {
                        expected[one as usize * n_sites + two as usize] += 1;
                    }
                }
            }
            let upper = (0..n_sites).flat_map(|one| {
                let row = one * n_sites;
                expected[row + one + 1..row + n_sites].iter().copied()
            });
            let expected: Vec<u32> = upper.collect();
            for (threads, method) in [(1, Method::Bits), (2, Method::Bits), (2, Method::Scatter)] {
                let pool = Pool::new(threads).unwrap();
                let counts = count_pairs(&baskets, method, &pool, &mut |_| true);
                assert_eq!(counts.as_ref(), Some(&expected));
            }
        }
    }
}

#[test]
fn many_rows_do_not_run_over() {
    for n_rows in [8191_usize, 8192, 8193, 65_535, 65_536, 131_073] {
        let mut baskets = Baskets::with_sites(4);
        for row in 0..n_rows {
            baskets.push((0..if row % 2 == 0 { 4 } else { 3 }).map(|site| site as u32));
        }
        let (all, even) = (n_rows as u32, n_rows.div_ceil(2) as u32);
        for method in [Method::Bits, Method::Scatter] {
            let pool = Pool::new(2).unwrap();
            let counts = count_pairs(&baskets, method, &pool, &mut |_| true);
            assert_eq!(counts, Some(vec![all, all, even, all, even, even]));
        }
    }
}

/// All orders of so many things.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(n - 1);
    let grown = shorter.iter().flat_map(|order| {
        (0..n).map(move |place| {
            let mut order = order.clone();
            order.insert(place, n - 1);
            order
        })
    });
    grown.collect()
}

/// Mean, variance and upper tail of the count of a pair over all exchanges of the second layer.
fn exchanged(first: &[bool], second: &[bool], strata: &[u32], count: u32) -> [f64; 3] {
    let keeps = |order: &Vec<usize>| {
        order
            .iter()
            .enumerate()
            .all(|(a, &b)| strata[a] == strata[b])
    };
    let counts: Vec<f64> = orders(first.len())
        .into_iter()
        .filter(keeps)
        .map(|order| {
            order
                .iter()
                .enumerate()
                .filter(|&(a, &b)| first[a] && second[b])
                .count() as f64
        })
        .collect();
    let n = counts.len() as f64;
    let mean = counts.iter().sum::<f64>() / n;
    let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n;
    let tail = counts.iter().filter(|&&c| c >= f64::from(count)).count() as f64 / n;
    [mean, variance, tail]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn chance_between_layers_equals_all_exchanges(
        bits in prop::collection::vec((any::<bool>(), any::<bool>(), 0_u32..2), 2..7),
    ) {
        let first: Vec<bool> = bits.iter().map(|row| row.0).collect();
        let second: Vec<bool> = bits.iter().map(|row| row.1).collect();
        let numbers: Vec<u32> = bits.iter().map(|row| row.2).collect();
        let rows: Sparse = bits.iter().map(|row| {
            [(row.0, 0), (row.1, 1)].into_iter().filter(|site| site.0).map(|site| site.1).collect()
        }).collect();
        let baskets = baskets(&rows, 2);
        let pool = Pool::new(1).unwrap();
        let counts = [brute(&rows, &[0, 1])];
        for (strata, numbers) in [
            (Strata::whole(rows.len()), vec![0; rows.len()]),
            (Strata::by(&numbers), numbers),
        ] {
            let found = chance(&baskets, whole(1, &strata), &counts, &pool, &mut |_| true).unwrap();
            let expected = exchanged(&first, &second, &numbers, counts[0]);
            prop_assert!((found.mean[0] - expected[0]).abs() < 1e-9);
            prop_assert!((found.variance[0] - expected[1]).abs() < 1e-9);
            if strata.len() == 1 {
                prop_assert!((10_f64.powf(found.log10_p[0]) - expected[2]).abs() < 1e-9);
            }
        }
    }
}

#[test]
fn chance_of_three_layers_equals_all_exchanges() {
    let rows: Sparse = [vec![0, 1, 2], vec![0, 1], vec![2], vec![0, 2], vec![1]]
        .into_iter()
        .map(|row| row.into_iter().collect())
        .collect();
    let has = |row: usize, site: u32| rows[row].contains(&site);
    let mut counts = Vec::new();
    for one in orders(5) {
        for two in orders(5) {
            let all = (0..5).filter(|&row| has(row, 0) && has(one[row], 1) && has(two[row], 2));
            counts.push(all.count() as f64);
        }
    }
    let n = counts.len() as f64;
    let mean = counts.iter().sum::<f64>() / n;
    let variance = counts
        .iter()
        .map(|count| (count - mean).powi(2))
        .sum::<f64>()
        / n;
    let pool = Pool::new(1).unwrap();
    let best = [Found {
        score: 1.0,
        count: 1,
        sites: [0, 1, 2, 0, 0, 0],
    }];
    let found = set_chance(
        &baskets(&rows, 3),
        whole(1, &Strata::whole(5)),
        (&best, 3),
        &pool,
    );
    assert!((found[0].mean - mean).abs() < 1e-9);
    assert!((found[0].variance - variance).abs() < 1e-9);
    let tail = counts.iter().filter(|&&count| count >= 1.0).count() as f64 / n;
    assert!(
        (10_f64.powf(found[0].log10_p) - tail).abs() < 0.05,
        "{tail}"
    );
}

#[test]
fn members_of_one_layer_act_as_one() {
    let rows: Sparse = [
        vec![0, 1, 2],
        vec![0, 1],
        vec![2],
        vec![0, 2],
        vec![0, 1, 2],
    ]
    .into_iter()
    .map(|row| row.into_iter().collect())
    .collect();
    let pool = Pool::new(1).unwrap();
    let best = [Found {
        score: 2.0,
        count: 2,
        sites: [0, 1, 2, 0, 0, 0],
    }];
    // Rows 0, 1 and 4 hold both experts of the first layer, four hold the one of the second.
    let found = set_chance(
        &baskets(&rows, 4),
        whole(2, &Strata::whole(5)),
        (&best, 3),
        &pool,
    );
    assert!((found[0].mean - 3.0 * 4.0 / 5.0).abs() < 1e-12);
    assert!((found[0].log10_p - 0.0).abs() < 1e-12);
    let found = set_chance(
        &baskets(&rows, 4),
        whole(4, &Strata::whole(5)),
        (&best, 3),
        &pool,
    );
    assert!(found[0].mean.is_nan() && found[0].log10_p.is_nan());
}

#[test]
fn work_stops_when_asked() {
    let rows: Sparse = (0..40)
        .map(|row| (row % 7..row % 7 + 5).collect())
        .collect();
    let baskets = baskets(&rows, 12);
    let pool = Pool::new(1).unwrap();
    assert!(count_pairs(&baskets, Method::Bits, &pool, &mut |_| false).is_none());
    let wanted = Wanted {
        size: 3,
        least: 1,
        top: 5,
        by_lift: false,
    };
    assert!(find_sets(&baskets, wanted, &pool, &mut |share| share < 0.5).is_none());
}
