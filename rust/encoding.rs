//! Codes of new rows on fixed atoms.

use crate::coding::{Coder, Desk};
use crate::dictionary::Dictionary;
use crate::error::{Error, Result};
use crate::parallel::Pool;
use crate::rows::{Entry, Lists, Rows};

/// Atoms to encode with, checked.
#[derive(Debug)]
pub struct Codebook {
    dictionary: Dictionary,
    caps: Vec<f32>,
    /// lambda 1 over lambda 2.
    ratio: f64,
}

impl Codebook {
    /// Atoms (`caps.len()` times `n_sites`, row-major), the largest code of each, and the price of
    /// a code in units of absolute error (lambda 1 over lambda 2).
    ///
    /// # Errors
    /// Lengths that do not fit, atoms outside [0, 1], caps or a ratio that are negative or NaN.
    pub fn new(atoms: &[f32], caps: &[f32], n_sites: usize, ratio: f64) -> Result<Self> {
        if atoms.len() != caps.len() * n_sites {
            let (got, expected) = (atoms.len(), caps.len() * n_sites);
            return Err(Error::Length {
                what: "atoms",
                got,
                expected,
            });
        }
        let lists = unit_atoms(atoms, n_sites)?;
        check("peak", caps, |v| v >= 0.0, "at least 0")?;
        if !(ratio.is_finite() && ratio >= 0.0) {
            return Err(Error::Setting {
                name: "ratio",
                got: ratio.to_string(),
                allowed: "finite and at least 0".into(),
            });
        }
        Ok(Self {
            dictionary: Dictionary::from_atoms(lists, n_sites),
            caps: caps.to_vec(),
            ratio,
        })
    }

    /// Codes of every row, ascending by atom: `ratio * sum r + |x - D r|_1` descends by exact
    /// coordinate steps and newcomers from nothing, over codes of at most the caps.
    ///
    /// # Errors
    /// Rows over another number of sites, or threads that cannot be started.
    pub fn encode(&self, rows: &Rows, threads: usize) -> Result<Vec<Vec<Entry>>> {
        self.fits(self.caps.len(), rows.n_sites())?;
        Ok(self.codes(rows, &Pool::new(threads)?))
    }

    /// Whether it has so many atoms over so many sites.
    ///
    /// # Errors
    /// It has not.
    pub(crate) fn fits(&self, n_atoms: usize, n_sites: usize) -> Result<()> {
        let found = (self.caps.len(), self.dictionary.n_sites());
        for (what, got, expected) in [("start", found.0, n_atoms), ("sites", found.1, n_sites)] {
            if got != expected {
                return Err(Error::Length {
                    what,
                    got,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// The atoms and the largest code of each.
    pub(crate) fn into_parts(self) -> (Dictionary, Vec<f32>) {
        (self.dictionary, self.caps)
    }

    fn codes(&self, rows: &Rows, pool: &Pool) -> Lists {
        let coder = Coder {
            dictionary: &self.dictionary,
            caps: &self.caps,
            ratio: self.ratio,
        };
        let desk = || Desk::new(self.dictionary.n_sites(), self.caps.len());
        pool.map(rows.len(), desk, |desk, row| {
            coder.improve(desk, rows.row(row), &[])
        })
    }
}

/// Row-major atoms over `n_sites` sites as lists.
///
/// # Errors
/// Values outside [0, 1].
pub(crate) fn unit_atoms(flat: &[f32], n_sites: usize) -> Result<Lists> {
    check("atoms", flat, |v| (0.0..=1.0).contains(&v), "in [0, 1]")?;
    Ok(flat.chunks(n_sites.max(1)).map(filled).collect())
}

fn filled(atom: &[f32]) -> Vec<Entry> {
    let all = atom.iter().enumerate().filter(|(_, value)| **value > 0.0);
    all.map(|(site, &value)| Entry {
        index: site as u32,
        value,
    })
    .collect()
}

fn check(
    what: &'static str,
    values: &[f32],
    good: impl Fn(f32) -> bool,
    allowed: &'static str,
) -> Result<()> {
    match values.iter().position(|&value| !good(value)) {
        None => Ok(()),
        Some(position) => Err(Error::Value {
            what,
            got: values[position].to_string(),
            position,
            allowed,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_made_of_atoms_gets_its_codes_back() {
        let atoms = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5];
        let book = Codebook::new(&atoms, &[1.0, 0.25], 4, 0.1).unwrap();
        let rows = Rows::new(
            &[0, 2, 6, 6],
            &[0, 1, 0, 1, 2, 3],
            &[0.5, 0.5, 2.0, 2.0, 0.2, 0.1],
            4,
        );
        let codes = book.encode(&rows.unwrap(), 1).unwrap();
        assert_eq!(
            codes[0],
            [Entry {
                index: 0,
                value: 0.5
            }]
        );
        assert_eq!(codes[1].len(), 2);
        assert!((codes[1][0].value - 1.0).abs() < 1e-6, "the cap binds");
        assert!((codes[1][1].value - 0.2).abs() < 1e-6);
        assert!(codes[2].is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Codebook::new(&[0.5; 3], &[1.0], 4, 0.0).is_err());
        assert!(Codebook::new(&[1.5; 4], &[1.0], 4, 0.0).is_err());
        assert!(Codebook::new(&[f32::NAN; 4], &[1.0], 4, 0.0).is_err());
        assert!(Codebook::new(&[0.5; 4], &[f32::NAN], 4, 0.0).is_err());
        assert!(Codebook::new(&[0.5; 4], &[1.0], 4, -1.0).is_err());
        let book = Codebook::new(&[0.5; 4], &[1.0], 4, 0.0).unwrap();
        let rows = Rows::new(&[0, 1], &[0], &[1.0], 5).unwrap();
        assert!(book.encode(&rows, 1).is_err());
    }
}
