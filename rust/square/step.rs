//! The dictionary step from outside, for fits that go over their rows block by block.
//!
//! What a block adds, A = sum w r'r and U = sum w r'(x - r D), is summed over the blocks; then the
//! atoms move by the same exact steps as in a fit at hand.

use crate::error::{Error, Result};
use crate::parallel::Pool;
use crate::square::encode::Codes;
use crate::square::level::{Level, Weights};
use crate::square::matrix::Matrix;
use crate::square::sheet::Sheet;
use crate::square::statistics::Statistics;
use crate::square::update::{BLOCK, Steps};

/// What some rows add to the sums the atoms follow, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    /// A, (`n_atoms`, `n_atoms`).
    pub second: Matrix,
    /// U, (`n_atoms`, `n_sites`).
    pub pull: Matrix,
    /// Weighted sums of the codes and of half the squared errors.
    pub cost: [f64; 2],
}

/// The share of some rows with given weights and codes.
pub(crate) fn share(
    sheet: Sheet,
    row_weights: Vec<f64>,
    atoms: Matrix,
    codes: Codes,
    threads: usize,
) -> Result<Share> {
    let (got, expected) = (codes.len(), sheet.len());
    if got != expected {
        let what = "codes";
        return Err(Error::Length {
            what,
            got,
            expected,
        });
    }
    let pool = Pool::new(threads)?;
    let weights = Weights {
        size: 0.0,
        sparsity: 1.0,
        reconstruction: 1.0,
    };
    let mut level = Level::coded(sheet, row_weights, atoms, codes, weights);
    let largest = level.largest_weight();
    pool.inside(|| level.sum_up(&pool));
    let terms = level.terms;
    Ok(Share {
        second: scaled(level.sums.second, largest),
        pull: scaled(level.sums.pull, largest),
        cost: [terms.sparsity, terms.reconstruction],
    })
}

/// The level sums in units of its largest weight.
fn scaled(mut matrix: Matrix, factor: f64) -> Matrix {
    let values = matrix.all_mut().iter_mut();
    values.for_each(|value| *value = (f64::from(*value) * factor) as f32);
    matrix
}

/// Atoms after some sweeps of exact steps on the sums; `pull` is U at the atoms given.
pub(crate) fn step_atoms(
    mut atoms: Matrix,
    second: Matrix,
    pull: Matrix,
    sweeps: usize,
    threads: usize,
) -> Result<Matrix> {
    let pool = Pool::new(threads)?;
    let mut sums = Statistics::new(atoms.n_rows(), atoms.width());
    (sums.second, sums.pull) = (second, pull);
    let mut steps = Steps::new(atoms.n_rows(), atoms.width());
    let all: Vec<u32> = (0..atoms.n_rows() as u32).collect();
    pool.inside(|| {
        for _ in 0..sweeps {
            for block in all.chunks(BLOCK) {
                steps.block(block, &mut atoms, &mut sums, &pool);
            }
        }
    });
    Ok(atoms)
}
