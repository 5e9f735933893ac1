//! Checks of sparse rows as they enter: every door uses these.

#![allow(
    clippy::inline_always,
    reason = "vector instructions reach only what is inlined into a dispatched function"
)]

use pulp::Arch;

use crate::error::{Error, Result};

/// More sites than any model has: what is allocated for each of them stays small.
const MOST_SITES: usize = 1 << 24;

/// Raises unless pointers, sites and values belong together and there are sites.
pub(crate) fn check_lengths(
    indptr: &[i64],
    sites: &[u32],
    values: &[f32],
    n_sites: usize,
) -> Result<()> {
    check_pointers(indptr, sites.len())?;
    if values.len() != sites.len() {
        let (got, expected) = (values.len(), sites.len());
        return Err(Error::Length {
            what: "values",
            got,
            expected,
        });
    }
    if n_sites == 0 {
        return Err(Error::Empty { what: "sites" });
    }
    if n_sites > MOST_SITES {
        return Err(Error::Setting {
            name: "n_sites",
            got: n_sites.to_string(),
            allowed: format!("at most {MOST_SITES}"),
        });
    }
    Ok(())
}

fn check_pointers(indptr: &[i64], n_entries: usize) -> Result<()> {
    if indptr.len() < 2 {
        return Err(Error::Empty { what: "rows" });
    }
    if indptr.len() > u32::MAX as usize {
        let (got, expected) = (indptr.len(), u32::MAX as usize);
        return Err(Error::Length {
            what: "indptr",
            got,
            expected,
        });
    }
    let ascending = |at: usize| at == 0 || indptr[at] >= indptr[at - 1];
    if let Some(at) = (0..indptr.len()).find(|&at| indptr[at] < 0 || !ascending(at)) {
        let got = indptr[at].to_string();
        let allowed = "ascending from 0";
        return Err(Error::Value {
            what: "indptr",
            got,
            position: at,
            allowed,
        });
    }
    let last = indptr[indptr.len() - 1] as usize;
    if indptr[0] != 0 || last != n_entries {
        return Err(Error::Length {
            what: "sites",
            got: n_entries,
            expected: last,
        });
    }
    Ok(())
}

/// Raises unless all values are finite and not negative.
pub(crate) fn check_values(values: &[f32]) -> Result<()> {
    if Arch::new().dispatch(|| all_good(values)) {
        return Ok(());
    }
    let position = values.iter().position(|&value| !good(value)).unwrap_or(0);
    Err(Error::Value {
        what: "values",
        got: values[position].to_string(),
        position,
        allowed: "finite and not negative",
    })
}

/// Raises unless the sites of one row ascend strictly; `offset` entries stand before it.
pub(crate) fn check_sites(sites: &[u32], offset: usize, n_sites: usize) -> Result<()> {
    if Arch::new().dispatch(|| ascending(sites, n_sites)) {
        return Ok(());
    }
    let wrong =
        |at: &usize| sites[*at] as usize >= n_sites || (*at > 0 && sites[at - 1] >= sites[*at]);
    let at = (0..sites.len()).find(wrong).unwrap_or(0);
    Err(Error::Value {
        what: "sites",
        got: sites[at].to_string(),
        position: offset + at,
        allowed: "below n_sites and strictly ascending within a row",
    })
}

fn good(value: f32) -> bool {
    (0.0..f32::INFINITY).contains(&value)
}

// Both are one maximum, without an early way out: a few vector instructions for each line.

/// Whether all values are good; as bits, what is not is larger (-0 too: then all are looked at).
#[inline(always)]
fn all_good(values: &[f32]) -> bool {
    let largest = values
        .iter()
        .fold(0, |most, value| value.to_bits().max(most));
    f32::from_bits(largest).is_finite() && largest >> 31 == 0
        || values.iter().all(|&value| good(value))
}

/// Whether sites ascend strictly below a bound.
#[inline(always)]
fn ascending(sites: &[u32], bound: usize) -> bool {
    let largest = sites.iter().copied().fold(0, u32::max);
    let next = sites.get(1..).unwrap_or_default();
    // Exact for sites below 2^31, as all are that pass the bound of any model.
    let difference = |(a, b): (&u32, &u32)| (*a as i32).wrapping_sub(*b as i32);
    let rise = sites.iter().zip(next).map(difference).fold(-1, i32::max);
    sites.is_empty() || (largest as usize) < bound.min(1 << 31) && rise < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Rows;
    use proptest::prelude::*;

    #[test]
    fn refuses_bad_input() {
        assert!(matches!(
            Rows::new(&[0], &[], &[], 3),
            Err(Error::Empty { .. })
        ));
        assert!(matches!(
            Rows::new(&[0, 0], &[], &[], 0),
            Err(Error::Empty { .. })
        ));
        assert!(matches!(
            Rows::new(&[0, 2], &[1], &[1.0], 3),
            Err(Error::Length { .. })
        ));
        assert!(matches!(
            Rows::new(&[0, 1], &[1], &[], 3),
            Err(Error::Length { .. })
        ));
        assert!(matches!(
            Rows::new(&[0, 2, 1], &[1], &[1.0], 3),
            Err(Error::Value { .. })
        ));
        assert!(Rows::new(&[0, 1], &[1], &[-0.0], 3).is_ok());
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            assert!(matches!(
                Rows::new(&[0, 1], &[1], &[bad], 3),
                Err(Error::Value { .. })
            ));
        }
        assert!(matches!(
            Rows::new(&[0, 0], &[], &[], usize::MAX),
            Err(Error::Setting { .. })
        ));
        let far = u32::MAX - 1;
        for sites in [[1, 1], [2, 1], [1, 3], [far, 1], [1, far]] {
            let out = Rows::new(&[0, 2], &sites, &[1.0, 1.0], 3);
            assert!(matches!(out, Err(Error::Value { .. })));
        }
    }

    proptest! {
        #[test]
        fn fast_checks_equal_slow_ones(
            sites in prop::collection::vec(prop_oneof![0_u32..40, any::<u32>()], 0..6),
            values in prop::collection::vec(prop_oneof![-1.0_f32..3.0, any::<f32>()], 0..6),
            bound in 1_usize..60,
        ) {
            let rising = sites.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = sites.iter().all(|&site| (site as usize) < bound);
            prop_assert_eq!(ascending(&sites, bound), rising && inside);
            prop_assert_eq!(all_good(&values), values.iter().all(|&value| good(value)));
        }
    }
}
