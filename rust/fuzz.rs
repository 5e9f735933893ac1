//! Arbitrary input at the doors of the crate: an error or a sound result, never a panic.
//!
//! `PROPTEST_CASES=2000000 cargo test --release fuzz` runs for a long time.

use proptest::prelude::*;

use crate::coverage::coverage_order;
use crate::encoding::Codebook;
use crate::hierarchy::{Fit, fit};
use crate::params::Params;
use crate::rows::Rows;

/// Any bits, but often ordinary numbers.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (0_u8..9).prop_map(|v| f32::from(v) / 8.0),
        2 => any::<u32>().prop_map(f32::from_bits).prop_map(f32::abs),
        1 => any::<u32>().prop_map(f32::from_bits),
    ]
}

/// Mostly in [0, 1].
fn strength() -> impl Strategy<Value = f32> {
    prop_oneof![200 => (0_u8..9).prop_map(|v| f32::from(v) / 8.0), 1 => value()]
}

pub(crate) fn weight() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (0_u16..4000).prop_map(|v| f64::from(v) / 10.0),
        1 => any::<u64>().prop_map(f64::from_bits),
    ]
}

/// Rows that are often sound: lists of sorted sites; now and then any arrays at all.
pub(crate) fn arrays<S: Strategy<Value = f32> + 'static>(
    value: fn() -> S,
) -> impl Strategy<Value = (Vec<i64>, Vec<u32>, Vec<f32>, usize)> {
    let row = prop::collection::btree_map(0_u32..9, value(), 0..6);
    let sound = prop::collection::vec(row, 1..12).prop_map(|rows| {
        let (mut pointers, mut sites, mut values) = (vec![0], vec![], vec![]);
        for row in rows {
            sites.extend(row.keys());
            values.extend(row.values());
            pointers.push(sites.len() as i64);
        }
        (pointers, sites, values, 9)
    });
    let pointers = prop::collection::vec(prop_oneof![-2_i64..12, any::<i64>()], 0..8);
    let sites = prop::collection::vec(prop_oneof![0_u32..9, any::<u32>()], 0..12);
    let values = prop::collection::vec(value(), 0..12);
    prop_oneof![6 => sound, 1 => (pointers, sites, values, 0_usize..12)]
}

fn params() -> impl Strategy<Value = Params> {
    let atoms = prop::collection::vec(0_usize..7, 0..4);
    (
        atoms,
        weight(),
        weight(),
        weight(),
        weight(),
        0_usize..5,
        any::<u64>(),
    )
        .prop_map(
            |(
                atoms,
                dictionary_size,
                sparsity,
                reconstruction,
                tolerance,
                max_iterations,
                seed,
            )| {
                Params {
                    atoms,
                    copies: seed % 2 == 1,
                    dictionary_size,
                    sparsity,
                    reconstruction,
                    max_iterations,
                    tolerance,
                    seed,
                    threads: 1,
                }
            },
        )
}

fn sound(found: &Fit, rows: &Rows, n_levels: usize) -> bool {
    let codes = |level: &crate::hierarchy::FittedLevel| {
        level.codes.iter().flatten().all(|code| code.value > 0.0)
            && level.peak.len() == level.atoms.len()
            && level
                .peak
                .iter()
                .zip(&level.atoms)
                .all(|(peak, atom)| (*peak > 0.0) != atom.is_empty())
    };
    let atoms = |level: &crate::hierarchy::FittedLevel| {
        let inside = |e: &crate::rows::Entry| e.value > 0.0 && e.value <= 1.0;
        level.atoms.iter().flatten().all(inside)
    };
    found.levels.len() == n_levels
        && found.levels[0].codes.len() == rows.len()
        && found
            .levels
            .iter()
            .all(|level| codes(level) && atoms(level))
}

proptest! {
    #[test]
    fn fuzz_rows_and_fit((pointers, sites, values, n_sites) in arrays(value), params in params()) {
        let rows = Rows::new(&pointers, &sites, &values, n_sites);
        if let (Ok(rows), Ok(params)) = (rows, params.check()) {
            let found = fit(rows.clone(), &params, &mut |_| true).unwrap();
            prop_assert!(sound(&found, &rows, params.atoms.len()));
        }
    }

    #[test]
    fn fuzz_encoding(
        (pointers, sites, values, n_sites) in arrays(value),
        book in prop::collection::vec((prop::array::uniform9(strength()), value()), 0..6),
        ratio in weight(), lost in 0_usize..30,
    ) {
        let mut atoms: Vec<f32> = book.iter().flat_map(|(atom, _)| *atom).collect();
        atoms.truncate(atoms.len() - usize::from(lost == 0).min(atoms.len()));
        let caps: Vec<f32> = book.iter().map(|(_, cap)| *cap).collect();
        let book = Codebook::new(&atoms, &caps, n_sites, ratio);
        if let (Ok(rows), Ok(book)) = (Rows::new(&pointers, &sites, &values, n_sites), book) {
            let codes = book.encode(&rows, 1).unwrap();
            prop_assert_eq!(codes.len(), rows.len());
            for code in codes.iter().flatten() {
                prop_assert!(code.value > 0.0 && code.value <= caps[code.index as usize]);
            }
        }
    }

    #[test]
    fn fuzz_coverage(
        (pointers, sites, values, n_sites) in arrays(value),
        weight in prop::collection::vec(weight(), 0..12), even in 0_u8..4, power in weight(),
    ) {
        if let Ok(rows) = Rows::new(&pointers, &sites, &values, n_sites) {
            let weight = if even > 0 { vec![1.0; rows.len()] } else { weight };
            if let Ok(found) = coverage_order(rows, &weight, power) {
                let mut order = found.order.clone();
                order.sort_unstable();
                prop_assert!(order.into_iter().eq(0..n_sites as u32));
                let along: Vec<f64> = found.order.iter().map(|&s| found.damage[s as usize]).collect();
                prop_assert!(along.iter().all(|damage| damage.is_finite()));
                prop_assert!(along.windows(2).all(|pair| pair[0] <= pair[1]));
            }
        }
    }
}
