//! Borrowed sparse rows, checked when they enter.

use crate::checks::{check_lengths, check_sites, check_values};
use crate::error::{Error, Result};

/// Values up to this have squares whose sums are finite in float32.
pub(crate) const LARGEST: f32 = 1e9;

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
        check_lengths(starts, sites, values, n_sites)?;
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
            check_sites(self.row(row).0, self.starts[row] as usize, self.n_sites)?;
        }
        Ok(())
    }

    fn check_values(&self, rows: std::ops::Range<usize>) -> Result<()> {
        let (from, to) = (
            self.starts[rows.start] as usize,
            self.starts[rows.end] as usize,
        );
        let values = &self.values[from..to];
        // A position counts from the first row, wherever the block begins.
        check_values(values).or_else(|_| check_values(&self.values[..to]))?;
        match values.iter().position(|&value| value > LARGEST) {
            None => Ok(()),
            Some(at) => Err(Error::Value {
                what: "values",
                got: values[at].to_string(),
                position: from + at,
                allowed: "at most 1e9 under squared error; divide all rows by one number",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_checked_alone_and_positions_are_those_of_all_rows() {
        let bad = |values: &[f32], sites: &[u32]| {
            let draft = Draft::new(&[0, 2, 3], sites, values, 3).unwrap();
            assert!(draft.rows(0..1).is_ok());
            match draft.rows(1..2) {
                Err(Error::Value { position, .. }) => position,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(bad(&[1.0, 0.0, f32::NAN], &[0, 2, 1]), 2);
        assert_eq!(bad(&[1.0, 0.0, 2e9], &[0, 2, 1]), 2);
        assert_eq!(bad(&[1.0, 0.0, 1.0], &[0, 2, 3]), 2);
    }
}
