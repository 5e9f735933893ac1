//! Which sites are active in each row, values left out: what mining counts.

use std::borrow::Cow;

use crate::error::Result;
use crate::rows::{check_lengths, check_sites, check_values};

/// Active sites of every row, checked: ascending within a row, in range.
#[derive(Debug, Clone)]
pub struct Baskets<'a> {
    starts: Vec<usize>,
    sites: Cow<'a, [u32]>,
    n_sites: usize,
}

impl<'a> Baskets<'a> {
    /// The sites of sparse rows whose value is above 0; not copied if all are.
    ///
    /// # Errors
    /// As for [`crate::Rows::new`].
    pub fn new(indptr: &[i64], sites: &'a [u32], values: &[f32], n_sites: usize) -> Result<Self> {
        check_lengths(indptr, sites, values, n_sites)?;
        for bounds in indptr.windows(2) {
            let row = &sites[bounds[0] as usize..bounds[1] as usize];
            if !ascending_below(row, n_sites) {
                check_sites(row, bounds[0] as usize, n_sites)?;
            }
        }
        if all_positive(values) {
            return Ok(Self {
                starts: indptr.iter().map(|&start| start as usize).collect(),
                sites: Cow::Borrowed(sites),
                n_sites,
            });
        }
        check_values(values)?;
        let mut out = Self::with_sites(n_sites);
        for bounds in indptr.windows(2) {
            let range = bounds[0] as usize..bounds[1] as usize;
            let pairs = sites[range.clone()].iter().zip(&values[range]);
            out.push(pairs.filter(|pair| *pair.1 > 0.0).map(|pair| *pair.0));
        }
        Ok(out)
    }

    /// No rows yet, over this many sites.
    pub(super) fn with_sites(n_sites: usize) -> Self {
        Self {
            starts: vec![0],
            sites: Cow::Owned(Vec::new()),
            n_sites,
        }
    }

    /// One more row of ascending sites.
    pub(super) fn push(&mut self, sites: impl Iterator<Item = u32>) {
        self.sites.to_mut().extend(sites);
        self.starts.push(self.sites.len());
    }

    /// Takes all sites before this one out, so that the rest lies close together.
    pub(super) fn drop_before(&mut self, site: u32) {
        let sites = self.sites.to_mut();
        let (mut end, mut start) = (0, 0);
        for row in 1..self.starts.len() {
            let stop = std::mem::replace(&mut self.starts[row], 0);
            let early = sites[start..stop].iter().take_while(|&&own| own < site);
            let from = start + early.count();
            sites.copy_within(from..stop, end);
            end += stop - from;
            self.starts[row] = end;
            start = stop;
        }
        sites.truncate(end);
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Number of sites.
    #[must_use]
    pub fn n_sites(&self) -> usize {
        self.n_sites
    }

    /// Active sites of one row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[u32] {
        &self.sites[self.starts[row]..self.starts[row + 1]]
    }

    /// Rows that hold each site: its load.
    #[must_use]
    pub fn loads(&self) -> Vec<u32> {
        let mut loads = vec![0; self.n_sites];
        for &site in self.sites.iter() {
            loads[site as usize] += 1;
        }
        loads
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Active sites over all rows.
    #[must_use]
    pub fn n_entries(&self) -> usize {
        self.sites.len()
    }
}

/// Whether sites ascend and stay below a number.
#[allow(
    clippy::needless_bitwise_bool,
    reason = "a branch per site would cost much more"
)]
fn ascending_below(row: &[u32], n_sites: usize) -> bool {
    let rising = row
        .windows(2)
        .fold(true, |good, pair| good & (pair[0] < pair[1]));
    rising && row.last().is_none_or(|&site| (site as usize) < n_sites)
}

#[allow(
    clippy::needless_bitwise_bool,
    reason = "a branch per value would cost much more"
)]
fn all_positive(values: &[f32]) -> bool {
    values.chunks(1024).all(|chunk| {
        let good = |good, &value| good & (value > 0.0) & (value < f32::INFINITY);
        chunk.iter().fold(true, good)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_rows_hold() {
        let (sites, values) = ([0, 2, 1, 2], [1.0, 2.0, 0.0, 3.0]);
        let baskets = Baskets::new(&[0, 2, 2, 4], &sites, &values, 3).unwrap();
        assert!(Baskets::new(&[0, 2, 2, 4], &sites, &values, 2).is_err());
        assert!(Baskets::new(&[0, 4], &sites, &values, 3).is_err());
        assert_eq!((baskets.row(0), baskets.row(1)), (&[0, 2][..], &[][..]));
        assert_eq!(baskets.loads(), [1, 0, 2]);
        assert_eq!(baskets.n_entries(), 3);

        let mut later = baskets;
        later.drop_before(1);
        assert_eq!((later.row(0), later.row(2)), (&[2][..], &[2][..]));
        later.drop_before(3);
        assert_eq!((later.n_entries(), later.len()), (0, 3));
    }
}
