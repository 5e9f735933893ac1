//! Parameters of the squared-error fit, and the same once checked.

use crate::error::{Error, Result};

/// What to fit and how long; the objective is in [`crate::square`].
#[derive(Debug, Clone)]
pub(crate) struct SquareParams {
    /// Atoms of each level, coarse to fine.
    pub atoms: Vec<usize>,
    /// Weight of the sum of largest codes, s; 0 for plain sparse coding.
    pub dictionary_size: f64,
    /// Weight of the code sparsity, lambda 1.
    pub sparsity: f64,
    /// Weight of half the squared error, lambda 2.
    pub reconstruction: f64,
    /// Passes of the online learner over the rows at most.
    pub passes: f64,
    /// Rows of a batch; 0 takes three quarters of the number of atoms.
    pub batch: usize,
    /// Exact iterations of a level at most.
    pub max_iterations: usize,
    /// A stage ends when an iteration lowers the objective by no more than this fraction.
    pub tolerance: f64,
    /// Seed of the starting atoms and of the order of rows.
    pub seed: u64,
    /// Worker threads; 0 takes one per processor.
    pub threads: usize,
}

/// Parameters that have passed all checks; can be made no other way.
#[derive(Debug, Clone)]
pub(crate) struct ValidSquareParams(SquareParams);

impl std::ops::Deref for ValidSquareParams {
    type Target = SquareParams;

    fn deref(&self) -> &SquareParams {
        &self.0
    }
}

impl SquareParams {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Setting`] names the field, what was given and what is allowed.
    pub fn check(self) -> Result<ValidSquareParams> {
        if self.atoms.is_empty() || self.atoms.iter().any(|&n| n == 0 || n >= u32::MAX as usize) {
            return Err(Error::Setting {
                name: "atoms",
                got: format!("{:?}", self.atoms),
                allowed: "one or more counts of at least 1, one per level".into(),
            });
        }
        not_negative("dictionary_size", self.dictionary_size)?;
        not_negative("sparsity", self.sparsity)?;
        not_negative("passes", self.passes)?;
        not_negative("tolerance", self.tolerance)?;
        let positive = self.reconstruction > 0.0;
        demand(
            "reconstruction",
            self.reconstruction,
            positive,
            "finite and above 0",
        )?;
        let some = self.max_iterations >= 1;
        demand(
            "max_iterations",
            self.max_iterations as f64,
            some,
            "at least 1",
        )?;
        Ok(ValidSquareParams(self))
    }
}

/// An error that names a setting below 0 or not finite.
pub(crate) fn not_negative(name: &'static str, got: f64) -> Result<()> {
    demand(name, got, got >= 0.0, "finite and at least 0")
}

/// An error that names a setting, unless it is good and finite.
pub(crate) fn demand(name: &'static str, got: f64, good: bool, allowed: &str) -> Result<()> {
    if good && got.is_finite() {
        return Ok(());
    }
    Err(Error::Setting {
        name,
        got: got.to_string(),
        allowed: allowed.into(),
    })
}
