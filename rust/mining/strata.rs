//! Rows in strata: tokens may change places only with tokens of the same id, or all with all.

use super::baskets::Baskets;

/// Rows sorted by stratum.
#[derive(Debug)]
pub(crate) struct Strata {
    starts: Vec<usize>,
    rows: Vec<u32>,
}

impl Strata {
    /// All rows in one stratum.
    pub fn whole(n_rows: usize) -> Self {
        Self {
            starts: vec![0, n_rows],
            rows: (0..n_rows as u32).collect(),
        }
    }

    /// Rows of equal number in one stratum, strata by ascending number.
    pub fn by(numbers: &[u32]) -> Self {
        let mut rows: Vec<u32> = (0..numbers.len() as u32).collect();
        rows.sort_by_key(|&row| numbers[row as usize]);
        let mut starts = vec![0];
        let differ = |pair: &[u32]| numbers[pair[0] as usize] != numbers[pair[1] as usize];
        starts.extend((1..rows.len()).filter(|&at| differ(&rows[at - 1..=at])));
        starts.push(rows.len());
        Self { starts, rows }
    }

    /// Number of strata.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Rows of one stratum.
    pub fn rows(&self, stratum: usize) -> &[u32] {
        &self.rows[self.starts[stratum]..self.starts[stratum + 1]]
    }

    /// Stratum of every row, and rows of every stratum.
    pub fn numbers(&self) -> (Vec<u32>, Vec<f64>) {
        let mut out = vec![0; self.rows.len()];
        for stratum in 0..self.len() {
            for &row in self.rows(stratum) {
                out[row as usize] = stratum as u32;
            }
        }
        let sizes = (0..self.len()).map(|stratum| self.rows(stratum).len() as f64);
        (out, sizes.collect())
    }
}

/// Load of one site in one stratum.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_field_names, reason = "a load is what it is")]
pub(super) struct Load {
    pub site: u32,
    pub stratum: u32,
    pub load: f64,
    /// a (N − a) / (N √(N − 1)): the variance of a shared count is the product of two of these.
    pub spread: f64,
    /// The same for the third moment, a (N − a) (N − 2 a) / √(N³ (N − 1) (N − 2)).
    pub skew: f64,
}

/// Loads of all sites in all strata.
#[derive(Debug)]
pub(super) struct Loads {
    starts: Vec<usize>,
    entries: Vec<Load>,
    /// Where each site stands in `entries`.
    places: Vec<Vec<usize>>,
    pub sizes: Vec<f64>,
}

impl Loads {
    pub fn new(baskets: &Baskets, strata: &Strata) -> Self {
        let mut out = Self {
            starts: vec![0],
            entries: Vec::new(),
            places: vec![Vec::new(); baskets.n_sites()],
            sizes: strata.numbers().1,
        };
        let mut loads = vec![0_u32; baskets.n_sites()];
        for stratum in 0..strata.len() {
            let mut touched = Vec::new();
            for &site in strata
                .rows(stratum)
                .iter()
                .flat_map(|&row| baskets.row(row as usize))
            {
                if loads[site as usize] == 0 {
                    touched.push(site);
                }
                loads[site as usize] += 1;
            }
            touched.sort_unstable();
            for site in touched {
                let load = f64::from(std::mem::take(&mut loads[site as usize]));
                out.places[site as usize].push(out.entries.len());
                out.entries.push(Load {
                    site,
                    stratum: stratum as u32,
                    load,
                    spread: spread(load, out.sizes[stratum]),
                    skew: skew(load, out.sizes[stratum]),
                });
            }
            out.starts.push(out.entries.len());
        }
        out
    }

    /// For each stratum that holds the site: its load there, and the loads of later sites.
    pub fn after(&self, site: usize) -> impl Iterator<Item = (Load, &[Load])> {
        self.places[site].iter().map(|&at| {
            let own = self.entries[at];
            (
                own,
                &self.entries[at + 1..self.starts[own.stratum as usize + 1]],
            )
        })
    }

    /// Loads of a range of sites in one stratum.
    pub fn within(&self, stratum: usize, sites: &std::ops::Range<u32>) -> &[Load] {
        let all = &self.entries[self.starts[stratum]..self.starts[stratum + 1]];
        let from = all.partition_point(|load| load.site < sites.start);
        let to = all.partition_point(|load| load.site < sites.end);
        &all[from..to]
    }
}

fn spread(load: f64, size: f64) -> f64 {
    if size < 2.0 {
        return 0.0;
    }
    load * (size - load) / (size * (size - 1.0).sqrt())
}

fn skew(load: f64, size: f64) -> f64 {
    if size < 3.0 {
        return 0.0;
    }
    let scale = (size.powi(3) * (size - 1.0) * (size - 2.0)).sqrt();
    load * (size - load) * (size - 2.0 * load) / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strata_hold_equal_numbers() {
        let strata = Strata::by(&[7, 2, 7, 9, 2]);
        let rows: Vec<&[u32]> = (0..strata.len()).map(|s| strata.rows(s)).collect();
        assert_eq!(rows, [&[1, 4][..], &[0, 2], &[3]]);
        assert_eq!(strata.numbers().0, [1, 0, 1, 2, 0]);
    }
}
