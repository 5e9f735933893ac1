//! One dictionary step from outside, for fits that go over their rows block by block.

use crate::dictionary::Dictionary;
use crate::error::{Error, Result};
use crate::level::{Level, Target};
use crate::parallel::Pool;
use crate::rows::{Entry, Lists, Rows};
use crate::update::update;

/// Rows with the weight of each, atoms in [0, 1] and the rows' codes on them, sorted by atom.
#[derive(Debug, Clone)]
pub struct Given {
    /// What is explained.
    pub rows: Rows,
    /// Weight of each row.
    pub weight: Vec<f64>,
    /// Atoms as sparse lists over sites.
    pub atoms: Vec<Vec<Entry>>,
    /// One row of codes for each row.
    pub codes: Rows,
}

/// The best atoms, site by site, for rows whose codes stay: exact coordinate steps on
/// `sum_c w_c |x_c - D r_c|_1` over D in [0, 1].
///
/// # Errors
/// Lengths that do not fit, or threads that cannot be started.
pub fn step_atoms(given: Given, threads: usize) -> Result<Vec<Vec<Entry>>> {
    let (n_rows, n_sites) = (given.rows.len(), given.rows.n_sites());
    let n_atoms = given.atoms.len();
    fits("codes", given.codes.len(), n_rows)?;
    fits("atoms", given.codes.n_sites(), n_atoms)?;
    check_weights("weight", &given.weight, n_rows)?;
    let codes: Lists = (0..n_rows)
        .map(|row| given.codes.row(row).to_vec())
        .collect();
    let mut level = Level::empty(Target::new(given.rows, given.weight), n_atoms);
    level.dictionary = Dictionary::from_atoms(given.atoms, n_sites);
    level.codes = codes;
    level.tighten();
    update(&mut level, &Pool::new(threads)?, None);
    Ok(level.dictionary.atoms().clone())
}

fn fits(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Length {
        what,
        got,
        expected,
    })
}

/// Checks weights given from outside: as many as needed, finite and not negative.
pub(crate) fn check_weights(what: &'static str, weights: &[f64], expected: usize) -> Result<()> {
    fits(what, weights.len(), expected)?;
    let bad = |weight: &f64| !(0.0..f64::INFINITY).contains(weight);
    match weights.iter().position(bad) {
        None => Ok(()),
        Some(position) => Err(Error::Value {
            what,
            got: weights[position].to_string(),
            position,
            allowed: "finite and at least 0",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        // Rows 1, 1 and 0.25 at one site, all coded 1: the median is 1.
        let rows = Rows::new(&[0, 1, 2, 3], &[0; 3], &[1.0, 1.0, 0.25], 1).unwrap();
        let codes = Rows::new(&[0, 1, 2, 3], &[0; 3], &[1.0; 3], 1).unwrap();
        let atoms = vec![vec![Entry {
            index: 0,
            value: 0.5,
        }]];
        Given {
            rows,
            weight: vec![1.0; 3],
            atoms,
            codes,
        }
    }

    #[test]
    fn an_atom_goes_to_the_weighted_median() {
        assert!((step_atoms(given(), 1).unwrap()[0][0].value - 1.0).abs() < 1e-6);
        let weight = vec![1.0, 1.0, 3.0];
        let heavy = step_atoms(Given { weight, ..given() }, 1).unwrap();
        assert!((heavy[0][0].value - 0.25).abs() < 1e-6);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(
            step_atoms(
                Given {
                    weight: vec![1.0; 2],
                    ..given()
                },
                1
            )
            .is_err()
        );
        assert!(
            step_atoms(
                Given {
                    weight: vec![1.0, 1.0, f64::NAN],
                    ..given()
                },
                1
            )
            .is_err()
        );
        assert!(
            step_atoms(
                Given {
                    atoms: vec![],
                    ..given()
                },
                1
            )
            .is_err()
        );
    }
}
