//! Parameters under squared error, and the same once checked.

use crate::error::{Error, Result};
use crate::square::encode::Encoding;
use crate::square::learner::Schedule;

/// Largest lambda 1 over lambda 2: what float32 holds, with room.
const MOST_RATIO: f64 = 1e30;

/// What to fit and how long; the objective is in [`crate::square`].
#[derive(Debug, Clone)]
pub(crate) struct SquareParams {
    /// Atoms of each level, coarse to fine.
    pub atoms: Vec<usize>,
    /// Whether finer levels may copy the atoms above, which the objective alone prefers.
    pub copies: bool,
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
        not_negative("passes", self.passes)?;
        not_negative("tolerance", self.tolerance)?;
        penalty(self.sparsity, self.reconstruction)?;
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

/// How rows are to be coded on fixed atoms.
#[derive(Debug, Clone)]
pub(crate) struct EncodeParams {
    /// Weight of the code sparsity, lambda 1.
    pub sparsity: f64,
    /// Weight of half the squared error, lambda 2.
    pub reconstruction: f64,
    /// A row is done when no code would move by more than this times lambda 1 / lambda 2.
    pub tolerance: f64,
    /// Largest allowed code of each atom.
    pub caps: Option<Vec<f32>>,
    /// Whether to compute duality gaps.
    pub gap: bool,
}

impl EncodeParams {
    /// Checks every field, for this many atoms.
    ///
    /// # Errors
    /// [`Error`] names the field, what was given and what is allowed.
    pub fn check(self, n_atoms: usize) -> Result<Encoding> {
        not_negative("tolerance", self.tolerance)?;
        if let Some(caps) = &self.caps {
            check_caps(caps, n_atoms)?;
        }
        Ok(Encoding {
            penalty: penalty(self.sparsity, self.reconstruction)?,
            tolerance: self.tolerance as f32,
            caps: self.caps,
            gap: self.gap,
        })
    }
}

/// How batches are to be drawn and the past forgotten; see [`Schedule`].
#[derive(Debug, Clone)]
pub(crate) struct LearnParams {
    /// Rows of a batch.
    pub batch: usize,
    /// Rows after which the past is forgotten at a constant rate.
    pub window: usize,
    /// After i rows, those of the first j weigh (j/i) to this power.
    pub exponent: f64,
    /// Fraction of the atoms that a batch moves.
    pub share: f64,
    /// Weight of the code sparsity, lambda 1.
    pub sparsity: f64,
    /// Weight of half the squared error, lambda 2.
    pub reconstruction: f64,
    /// Tolerance of the coder.
    pub tolerance: f64,
    /// Seed of the order of rows and of replacements.
    pub seed: u64,
}

impl LearnParams {
    /// Checks every field; a batch is at most all of `n_rows`.
    ///
    /// # Errors
    /// [`Error::Setting`] names the field, what was given and what is allowed.
    pub fn check(self, n_rows: usize) -> Result<Schedule> {
        demand("batch", self.batch as f64, self.batch > 0, "at least 1")?;
        demand("window", self.window as f64, self.window > 0, "at least 1")?;
        let part = self.share > 0.0 && self.share <= 1.0;
        demand("share", self.share, part, "above 0 and at most 1")?;
        not_negative("exponent", self.exponent)?;
        not_negative("tolerance", self.tolerance)?;
        Ok(Schedule {
            batch: self.batch.min(n_rows),
            window: self.window,
            exponent: self.exponent,
            share: self.share,
            penalty: penalty(self.sparsity, self.reconstruction)?,
            tolerance: self.tolerance as f32,
            seed: self.seed,
        })
    }
}

/// lambda 1 over lambda 2, checked.
fn penalty(sparsity: f64, reconstruction: f64) -> Result<f32> {
    not_negative("sparsity", sparsity)?;
    let positive = reconstruction > 0.0;
    demand(
        "reconstruction",
        reconstruction,
        positive,
        "finite and above 0",
    )?;
    let ratio = sparsity / reconstruction;
    let allowed = "at most 1e30 times reconstruction";
    demand("sparsity", sparsity, ratio <= MOST_RATIO, allowed)?;
    Ok(ratio as f32)
}

fn check_caps(caps: &[f32], n_atoms: usize) -> Result<()> {
    if caps.len() != n_atoms {
        let (got, expected) = (caps.len(), n_atoms);
        return Err(Error::Length {
            what: "caps",
            got,
            expected,
        });
    }
    match caps.iter().position(|cap| cap.is_nan() || *cap < 0.0) {
        None => Ok(()),
        Some(position) => Err(Error::Value {
            what: "caps",
            got: caps[position].to_string(),
            position,
            allowed: "at least 0",
        }),
    }
}

/// An error that names a setting below 0 or not finite.
fn not_negative(name: &'static str, got: f64) -> Result<()> {
    demand(name, got, got >= 0.0, "finite and at least 0")
}

/// An error that names a setting, unless it is good and finite.
fn demand(name: &'static str, got: f64, good: bool, allowed: &str) -> Result<()> {
    if good && got.is_finite() {
        return Ok(());
    }
    Err(Error::Setting {
        name,
        got: got.to_string(),
        allowed: allowed.into(),
    })
}
