//! Which sites are active in each row, values left out: what mining counts.

use crate::rows::Rows;

/// Active sites of every row, ascending within a row.
#[derive(Debug, Clone)]
pub(super) struct Baskets {
    starts: Vec<usize>,
    sites: Vec<u32>,
    n_sites: usize,
}

impl Baskets {
    /// The sites of checked rows.
    pub fn new(rows: &Rows) -> Self {
        let mut out = Self::with_sites(rows.n_sites());
        for row in 0..rows.len() {
            out.push(rows.row(row).iter().map(|entry| entry.index));
        }
        out
    }

    /// No rows yet, over this many sites.
    pub(super) fn with_sites(n_sites: usize) -> Self {
        Self {
            starts: vec![0],
            sites: Vec::new(),
            n_sites,
        }
    }

    /// Takes all rows out and keeps the memory.
    pub(super) fn clear(&mut self, n_sites: usize) {
        self.starts.truncate(1);
        self.sites.clear();
        self.n_sites = n_sites;
    }

    /// One more row of ascending sites.
    pub(super) fn push(&mut self, sites: impl Iterator<Item = u32>) {
        self.sites.extend(sites);
        self.starts.push(self.sites.len());
    }

    /// Takes all sites before this one out, so that the rest lies close together.
    pub(super) fn drop_before(&mut self, site: u32) {
        let (mut end, mut start) = (0, 0);
        for row in 1..self.starts.len() {
            let stop = std::mem::replace(&mut self.starts[row], 0);
            let early = self.sites[start..stop]
                .iter()
                .take_while(|&&own| own < site);
            let from = start + early.count();
            self.sites.copy_within(from..stop, end);
            end += stop - from;
            self.starts[row] = end;
            start = stop;
        }
        self.sites.truncate(end);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Number of sites.
    pub fn n_sites(&self) -> usize {
        self.n_sites
    }

    /// Active sites of one row.
    pub fn row(&self, row: usize) -> &[u32] {
        &self.sites[self.starts[row]..self.starts[row + 1]]
    }

    /// Rows that hold each site: its load.
    pub fn loads(&self) -> Vec<u32> {
        let mut loads = vec![0; self.n_sites];
        for &site in &self.sites {
            loads[site as usize] += 1;
        }
        loads
    }

    /// Active sites over all rows.
    pub fn n_entries(&self) -> usize {
        self.sites.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_rows_hold() {
        let rows = Rows::new(&[0, 2, 2, 4], &[0, 2, 1, 2], &[1.0, 2.0, 0.0, 3.0], 3).unwrap();
        let baskets = Baskets::new(&rows);
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
