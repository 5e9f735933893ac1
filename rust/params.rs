//! Parameters of the fit, and the same once checked.
//!
//! The objective (arXiv:2504.12359, eq. 4 to 7, with sums written out), K levels, rows are tokens:
//!
//! ```text
//! L =  s sum_k sum_i max_c R_k[i, c]                                            (dictionary size)
//!    + lambda1 sum_k (1/N_k) sum_j u_k[j] |R_{k+1}[:, j]|_1                      (sparsity)
//!    + lambda2 sum_k (1/N_k) sum_j u_k[j] |D_k[:, j] - D_{k+1} R_{k+1}[:, j]|_1  (reconstruction)
//! s = 1, D_0 = X, R_0 = identity, u_k[j] = |R_k[j, :]|_1, N_k = columns of R_k, D in [0, 1], R >= 0
//! ```
//!
//! `u_k` is held fixed within a stage and refreshed between stages.

use crate::error::{Error, Result};

/// What to fit and how long.
#[derive(Debug, Clone)]
pub struct Params {
    /// Atoms of each level, coarse to fine.
    pub atoms: Vec<usize>,
    /// Whether finer levels may copy the atoms above, which the objective alone prefers.
    pub copies: bool,
    /// Weight of the dictionary size; the paper's is 1, at 0 no atom is switched off.
    pub dictionary_size: f64,
    /// Weight of the code sparsity, the paper's lambda 1.
    pub sparsity: f64,
    /// Weight of the reconstruction error, the paper's lambda 2.
    pub reconstruction: f64,
    /// Iterations of a stage at most.
    pub max_iterations: usize,
    /// A stage ends when an iteration lowers the objective by less than this fraction.
    pub tolerance: f64,
    /// Seed of the starting atoms.
    pub seed: u64,
    /// Worker threads; 0 takes one per processor.
    pub threads: usize,
}

/// Parameters that have passed all checks; can be made no other way.
#[derive(Debug, Clone)]
pub struct ValidParams(Params);

impl Params {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Setting`] names the field, what was given and what is allowed.
    pub fn check(self) -> Result<ValidParams> {
        if self.atoms.is_empty() || self.atoms.iter().any(|&n| n == 0 || n >= u32::MAX as usize) {
            let got = format!("{:?}", self.atoms);
            let allowed = "one or more counts of at least 1, one per level".into();
            return Err(Error::Setting {
                name: "atoms",
                got,
                allowed,
            });
        }
        let at_least = |name, got: f64, ok: bool, allowed: &str| {
            let bad = Error::Setting {
                name,
                got: got.to_string(),
                allowed: allowed.into(),
            };
            if ok && got.is_finite() {
                Ok(())
            } else {
                Err(bad)
            }
        };
        at_least(
            "dictionary_size",
            self.dictionary_size,
            self.dictionary_size >= 0.0,
            "finite and at least 0",
        )?;
        at_least(
            "sparsity",
            self.sparsity,
            self.sparsity >= 0.0,
            "finite and at least 0",
        )?;
        let positive = self.reconstruction > 0.0;
        at_least(
            "reconstruction",
            self.reconstruction,
            positive,
            "finite and above 0",
        )?;
        at_least(
            "tolerance",
            self.tolerance,
            self.tolerance >= 0.0,
            "finite and at least 0",
        )?;
        let some = self.max_iterations >= 1;
        at_least(
            "max_iterations",
            self.max_iterations as f64,
            some,
            "at least 1",
        )?;
        Ok(ValidParams(self))
    }
}

impl std::ops::Deref for ValidParams {
    type Target = Params;

    fn deref(&self) -> &Params {
        &self.0
    }
}

/// Values of one dense array at most: 8 GB.
const MOST_VALUES: usize = 1 << 31;

/// Raises unless every level is small enough for dense arrays of its atoms by sites and by atoms.
///
/// # Errors
/// [`Error::Setting`] says how many atoms are allowed.
pub(crate) fn check_size(atoms: &[usize], n_sites: usize) -> Result<()> {
    let largest = atoms.iter().copied().max().unwrap_or(0);
    let width = largest.max(n_sites);
    if largest.checked_mul(width).is_some_and(|n| n <= MOST_VALUES) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "atoms",
        got: format!("{atoms:?}"),
        allowed: format!("so few that atoms x sites and atoms x atoms are at most {MOST_VALUES}"),
    })
}

/// The weights of the objective.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lambda {
    pub dictionary_size: f64,
    pub sparsity: f64,
    pub reconstruction: f64,
}

impl Lambda {
    /// lambda 1 over lambda 2: within one row only this ratio matters.
    pub fn ratio(self) -> f64 {
        self.sparsity / self.reconstruction
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Params {
        let (max_iterations, seed, threads) = (5, 0, 1);
        let (sparsity, reconstruction, tolerance) = (0.1, 10.0, 1e-3);
        let atoms = vec![2, 3];
        Params {
            atoms,
            copies: false,
            dictionary_size: 1.0,
            sparsity,
            reconstruction,
            max_iterations,
            tolerance,
            seed,
            threads,
        }
    }

    #[test]
    fn names_a_negative_weight_of_the_size() {
        let dictionary_size = -1.0;
        let bad = Params {
            dictionary_size,
            ..good()
        };
        assert!(
            bad.check()
                .is_err_and(|error| error.to_string().contains("dictionary_size"))
        );
    }

    #[test]
    fn names_the_bad_field() {
        assert!(good().check().is_ok());
        let bad = [
            (
                "atoms",
                Params {
                    atoms: vec![],
                    ..good()
                },
            ),
            (
                "atoms",
                Params {
                    atoms: vec![4, 0],
                    ..good()
                },
            ),
            (
                "sparsity",
                Params {
                    sparsity: -0.1,
                    ..good()
                },
            ),
            (
                "reconstruction",
                Params {
                    reconstruction: 0.0,
                    ..good()
                },
            ),
            (
                "reconstruction",
                Params {
                    reconstruction: f64::NAN,
                    ..good()
                },
            ),
            (
                "tolerance",
                Params {
                    tolerance: -1.0,
                    ..good()
                },
            ),
            (
                "max_iterations",
                Params {
                    max_iterations: 0,
                    ..good()
                },
            ),
        ];
        for (expected, params) in bad {
            match params.check() {
                Err(Error::Setting { name, .. }) => assert_eq!(name, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
