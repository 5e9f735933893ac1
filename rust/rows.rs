//! Sparse rows that have passed all checks, and their transpose.

pub(crate) use crate::checks::{check_lengths, check_sites, check_values};
use crate::error::Result;

/// One non-zero of a sparse row: its index and value.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Entry {
    /// Site, atom or row, by context.
    pub index: u32,
    /// Value, positive.
    pub value: f32,
}

/// Sparse lists of entries, each sorted by index.
pub(crate) type Lists = Vec<Vec<Entry>>;

/// Checked sparse rows in compressed form: finite, non-negative, sorted, no duplicates.
#[derive(Debug, Clone)]
pub struct Rows {
    starts: Vec<usize>,
    entries: Vec<Entry>,
    n_sites: usize,
}

impl Rows {
    /// Rows from compressed arrays; stored zeros are left out.
    ///
    /// # Errors
    /// Empty input, lengths that do not fit, sites out of range or not ascending, values that are
    /// negative or not finite.
    pub fn new(indptr: &[i64], sites: &[u32], values: &[f32], n_sites: usize) -> Result<Self> {
        check_lengths(indptr, sites, values, n_sites)?;
        check_values(values)?;
        let mut starts = Vec::with_capacity(indptr.len());
        let mut entries = Vec::with_capacity(sites.len());
        starts.push(0);
        for bounds in indptr.windows(2) {
            let range = bounds[0] as usize..bounds[1] as usize;
            check_sites(&sites[range.clone()], range.start, n_sites)?;
            let pairs = sites[range.clone()].iter().zip(&values[range]);
            let kept = pairs.filter(|(_, value)| **value > 0.0);
            entries.extend(kept.map(|(&index, &value)| Entry { index, value }));
            starts.push(entries.len());
        }
        Ok(Self {
            starts,
            entries,
            n_sites,
        })
    }

    /// Rows from lists that are known to be good.
    pub(crate) fn from_lists(lists: &Lists, n_sites: usize) -> Self {
        let mut starts = Vec::with_capacity(lists.len() + 1);
        starts.push(0);
        let mut entries = Vec::new();
        for list in lists {
            entries.extend_from_slice(list);
            starts.push(entries.len());
        }
        Self {
            starts,
            entries,
            n_sites,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether no row holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of sites.
    #[must_use]
    pub fn n_sites(&self) -> usize {
        self.n_sites
    }

    /// The entries of one row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[Entry] {
        &self.entries[self.starts[row]..self.starts[row + 1]]
    }

    /// Some of the rows, in the order given.
    pub(crate) fn pick(&self, rows: &[u32]) -> Self {
        let mut starts = vec![0];
        let mut entries = Vec::new();
        for &row in rows {
            entries.extend_from_slice(self.row(row as usize));
            starts.push(entries.len());
        }
        Self {
            starts,
            entries,
            n_sites: self.n_sites,
        }
    }

    /// For each site the rows that hold it.
    pub(crate) fn columns(&self) -> Self {
        let mut starts = vec![0; self.n_sites + 1];
        for entry in &self.entries {
            starts[entry.index as usize + 1] += 1;
        }
        for site in 0..self.n_sites {
            starts[site + 1] += starts[site];
        }
        let mut next = starts.clone();
        let mut entries = vec![Entry::default(); self.entries.len()];
        for row in 0..self.len() {
            for entry in self.row(row) {
                let place = &mut next[entry.index as usize];
                entries[*place] = Entry {
                    index: row as u32,
                    value: entry.value,
                };
                *place += 1;
            }
        }
        Self {
            starts,
            entries,
            n_sites: self.len(),
        }
    }
}

/// Transpose of lists: for each of `n` indices the lists that hold it, in order.
pub(crate) fn transpose(lists: &Lists, n: usize) -> Lists {
    let mut counts = vec![0_usize; n];
    for entry in lists.iter().flatten() {
        counts[entry.index as usize] += 1;
    }
    let mut out: Lists = counts.into_iter().map(Vec::with_capacity).collect();
    for (row, list) in lists.iter().enumerate() {
        for entry in list {
            out[entry.index as usize].push(Entry {
                index: row as u32,
                value: entry.value,
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_and_drops_zeros() {
        let rows = Rows::new(&[0, 2, 2, 4], &[0, 2, 1, 2], &[1.0, 2.0, 0.0, 3.0], 3).unwrap();
        assert_eq!(
            (rows.len(), rows.row(1).len(), rows.row(2).len()),
            (3, 0, 1)
        );
        let columns = rows.columns();
        let expected = [
            Entry {
                index: 0,
                value: 2.0,
            },
            Entry {
                index: 2,
                value: 3.0,
            },
        ];
        assert_eq!(columns.row(2), &expected);
        assert!(columns.row(1).is_empty());
    }
}
