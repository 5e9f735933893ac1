//! The terms of the objective, each by itself, in float64.

use crate::level::Level;
use crate::parallel::Pool;
use crate::params::Lambda;

/// The three terms without their weights, and the weighted total.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Terms {
    /// Sum over atoms of the largest code.
    pub dictionary_size: f64,
    /// Weighted mean over rows of the sum of codes.
    pub sparsity: f64,
    /// Weighted mean over rows of the absolute error.
    pub reconstruction: f64,
    /// The sum of the terms times their weights.
    pub total: f64,
}

impl Terms {
    /// Terms of two levels together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            dictionary_size: self.dictionary_size + other.dictionary_size,
            sparsity: self.sparsity + other.sparsity,
            reconstruction: self.reconstruction + other.reconstruction,
            total: self.total + other.total,
        }
    }
}

/// The terms of one level, computed afresh.
pub(crate) fn terms(level: &Level, pool: &Pool, lambda: Lambda) -> Terms {
    let dictionary_size = dictionary_size(level);
    let sparsity = sparsity(level);
    let reconstruction = reconstruction(level, pool);
    let total = lambda.dictionary_size * dictionary_size
        + lambda.sparsity * sparsity
        + lambda.reconstruction * reconstruction;
    Terms {
        dictionary_size,
        sparsity,
        reconstruction,
        total,
    }
}

/// Sum over atoms of the largest code.
fn dictionary_size(level: &Level) -> f64 {
    let mut peaks = vec![0.0_f32; level.n_atoms()];
    for code in level.codes.iter().flatten() {
        let peak = &mut peaks[code.index as usize];
        *peak = peak.max(code.value);
    }
    peaks.into_iter().map(f64::from).sum()
}

/// Sum over rows of weight times the sum of codes.
fn sparsity(level: &Level) -> f64 {
    let rows = level.codes.iter().zip(&level.target.weight);
    rows.map(|(codes, weight)| weight * codes.iter().map(|c| f64::from(c.value)).sum::<f64>())
        .sum()
}

/// Sum over rows of weight times the absolute error, in float64 throughout.
fn reconstruction(level: &Level, pool: &Pool) -> f64 {
    let desk = || vec![0.0_f64; level.dictionary.n_sites()];
    pool.sum(level.n_rows(), desk, |desk, row| {
        let mut touched: Vec<u32> = Vec::new();
        for entry in level.target.rows.row(row) {
            desk[entry.index as usize] += f64::from(entry.value);
            touched.push(entry.index);
        }
        for code in &level.codes[row] {
            for member in level.dictionary.atom(code.index as usize) {
                desk[member.index as usize] -= f64::from(code.value) * f64::from(member.value);
                touched.push(member.index);
            }
        }
        let mut error = 0.0;
        for site in touched {
            error += desk[site as usize].abs();
            desk[site as usize] = 0.0;
        }
        level.target.weight[row] * error
    })
}
