//! Borrowed sparse rows, checked when they enter.

use pulp::Arch;

use crate::error::{Error, Result};

/// Compressed sparse rows over sites: values finite and not negative, sites ascending.
///
/// Borrowed, so that a caller may keep more rows than memory holds and pass them piece by piece.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sheet<'a> {
    starts: &'a [i64],
    sites: &'a [u32],
    values: &'a [f32],
    n_sites: usize,
}

/// Rows whose entries are still to be checked.
///
/// Checking reads everything once; a reader that goes through the rows in order anyway does it
/// block by block, while a block is in the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draft<'a>(Sheet<'a>);

impl<'a> Draft<'a> {
    /// Rows from compressed arrays whose lengths fit.
    ///
    /// # Errors
    /// Empty input, pointers that do not ascend, lengths that do not fit.
    pub fn new(
        starts: &'a [i64],
        sites: &'a [u32],
        values: &'a [f32],
        n_sites: usize,
    ) -> Result<Self> {
        check_starts(starts, sites.len())?;
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
        Ok(Self(Sheet {
            starts,
            sites,
            values,
            n_sites,
        }))
    }

    /// All rows, checked.
    ///
    /// # Errors
    /// Sites out of range or not ascending, values that are negative or not finite.
    pub fn sheet(self) -> Result<Sheet<'a>> {
        self.rows(0..self.len())
    }

    /// The same rows, of which these have been checked.
    ///
    /// # Errors
    /// As for [`Self::sheet`].
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Result<Sheet<'a>> {
        self.0.check_values(rows.clone())?;
        self.0.check_sites(rows)?;
        Ok(self.0)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Number of sites.
    pub fn n_sites(&self) -> usize {
        self.0.n_sites()
    }

    /// Fraction of the entries that are stored.
    pub fn density(&self) -> f64 {
        self.0.density()
    }
}

impl<'a> Sheet<'a> {
    /// Rows from compressed arrays, checked.
    ///
    /// # Errors
    /// As for [`Draft::new`] and [`Draft::sheet`].
    pub fn new(
        starts: &'a [i64],
        sites: &'a [u32],
        values: &'a [f32],
        n_sites: usize,
    ) -> Result<Self> {
        Draft::new(starts, sites, values, n_sites)?.sheet()
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Number of sites.
    pub fn n_sites(&self) -> usize {
        self.n_sites
    }

    /// Whether all rows are zero.
    pub fn is_zero(&self) -> bool {
        self.values.iter().all(|&value| value <= 0.0)
    }

    /// Fraction of the entries that are stored.
    pub fn density(&self) -> f64 {
        self.values.len() as f64 / (self.len() as f64 * self.n_sites as f64)
    }

    /// Sites and values of one row.
    #[inline]
    pub fn row(&self, row: usize) -> (&'a [u32], &'a [f32]) {
        let range = self.starts[row] as usize..self.starts[row + 1] as usize;
        (&self.sites[range.clone()], &self.values[range])
    }

    /// Writes one row into dense zeros.
    #[inline]
    pub fn spread(&self, row: usize, dense: &mut [f32]) {
        dense.fill(0.0);
        let (sites, values) = self.row(row);
        for (&site, &value) in sites.iter().zip(values) {
            dense[site as usize] = value;
        }
    }

    /// Sum of the squares of one row.
    pub fn square(&self, row: usize) -> f64 {
        let values = self.row(row).1;
        values
            .iter()
            .map(|&value| f64::from(value) * f64::from(value))
            .sum()
    }

    fn check_sites(&self, rows: std::ops::Range<usize>) -> Result<()> {
        for row in rows {
            let sites = self.row(row).0;
            if !Arch::new().dispatch(|| ascending(sites, self.n_sites)) {
                return Err(self.bad_site(row));
            }
        }
        Ok(())
    }

    fn check_values(&self, rows: std::ops::Range<usize>) -> Result<()> {
        let from = self.starts[rows.start] as usize;
        let values = &self.values[from..self.starts[rows.end] as usize];
        if Arch::new().dispatch(|| all_good(values)) {
            return Ok(());
        }
        let position = values.iter().position(|&value| !good(value)).unwrap_or(0);
        Err(Error::Value {
            what: "values",
            got: values[position].to_string(),
            position: from + position,
            allowed: "finite and not negative",
        })
    }

    fn bad_site(&self, row: usize) -> Error {
        let sites = self.row(row).0;
        let wrong = |at: &usize| {
            sites[*at] as usize >= self.n_sites || (*at > 0 && sites[at - 1] >= sites[*at])
        };
        let at = (0..sites.len()).find(wrong).unwrap_or(0);
        Error::Value {
            what: "sites",
            got: sites[at].to_string(),
            position: self.starts[row] as usize + at,
            allowed: "below n_sites and strictly ascending within a row",
        }
    }
}

fn check_starts(starts: &[i64], n_entries: usize) -> Result<()> {
    if starts.len() < 2 {
        return Err(Error::Empty { what: "rows" });
    }
    if let Some(at) =
        (0..starts.len()).find(|&at| starts[at] < if at > 0 { starts[at - 1] } else { 0 })
    {
        return Err(Error::Value {
            what: "indptr",
            got: starts[at].to_string(),
            position: at,
            allowed: "ascending from 0",
        });
    }
    let last = starts[starts.len() - 1] as usize;
    if starts[0] != 0 || last != n_entries {
        return Err(Error::Length {
            what: "sites",
            got: n_entries,
            expected: last,
        });
    }
    if starts.len() > u32::MAX as usize {
        let (got, expected) = (starts.len(), u32::MAX as usize);
        return Err(Error::Length {
            what: "indptr",
            got,
            expected,
        });
    }
    Ok(())
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
    use proptest::prelude::*;

    #[test]
    fn refuses_bad_input() {
        let new = |starts: &[i64], sites: &[u32], values: &[f32], n: usize| {
            Sheet::new(starts, sites, values, n).map(|sheet| sheet.len())
        };
        assert_eq!(new(&[0, 2, 2], &[0, 2], &[1.0, 0.0], 3), Ok(2));
        assert!(matches!(new(&[0], &[], &[], 3), Err(Error::Empty { .. })));
        assert!(matches!(
            new(&[0, 0], &[], &[], 0),
            Err(Error::Empty { .. })
        ));
        assert!(matches!(
            new(&[0, 2], &[1], &[1.0], 3),
            Err(Error::Length { .. })
        ));
        assert!(matches!(
            new(&[0, 1], &[1], &[], 3),
            Err(Error::Length { .. })
        ));
        assert!(matches!(
            new(&[0, 2, 1], &[1], &[1.0], 3),
            Err(Error::Value { .. })
        ));
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            assert!(matches!(
                new(&[0, 1], &[1], &[bad], 3),
                Err(Error::Value { .. })
            ));
        }
        assert_eq!(new(&[0, 1], &[1], &[-0.0], 3), Ok(1));
        let far = u32::MAX - 1;
        for sites in [[1, 1], [2, 1], [1, 3], [far, 1], [1, far]] {
            assert!(matches!(
                new(&[0, 2], &sites, &[1.0, 1.0], 3),
                Err(Error::Value { .. })
            ));
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
