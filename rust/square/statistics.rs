//! What a batch adds to the sums the dictionary is learned from.
//!
//! A = sum w r'r and U = B - A D = sum w r'(x - r D), with the weights w of past batches falling as
//! newer ones come (Mairal et al. 2010, section 3.4). Only ratios of the sums matter, so instead of
//! shrinking the old ones, each batch enters with a larger weight.

use pulp::{Arch, Simd, WithSimd};

use crate::parallel::Pool;
use crate::square::matrix::Matrix;
use crate::square::slot::Slot;

/// Atoms that one worker adds to at a time.
const TOGETHER: usize = 8;
/// Weights above this are scaled back.
const LARGE: f32 = 16_777_216.0;

/// The sums, in units of the weight of a row of the latest batch.
#[derive(Debug, Clone)]
pub(crate) struct Statistics {
    /// A, (`n_atoms`, `n_atoms`).
    pub second: Matrix,
    /// U = B - A D, (`n_atoms`, `n_sites`).
    pub pull: Matrix,
    /// Sum of codes of each atom.
    pub first: Vec<f32>,
    /// Sum of the weights of rows.
    pub mass: f32,
    /// Weight of a row of the latest batch.
    pub weight: f32,
    by_atom: Vec<Vec<(u32, f32)>>,
}

impl Statistics {
    /// No rows yet.
    pub fn new(n_atoms: usize, n_sites: usize) -> Self {
        Self {
            second: Matrix::zeros(n_atoms, n_atoms),
            pull: Matrix::zeros(n_atoms, n_sites),
            first: vec![0.0; n_atoms],
            mass: 0.0,
            weight: 1.0,
            by_atom: vec![Vec::new(); n_atoms],
        }
    }

    /// Keeps this fraction of the past; 0 forgets it.
    pub fn forget(&mut self, keep: f64) {
        if keep > 1e-6 {
            self.weight /= keep as f32;
        } else {
            self.scale(0.0);
        }
        if self.weight > LARGE {
            // A power of two, so that scaling does not round.
            self.scale(LARGE.recip());
        }
    }

    fn scale(&mut self, factor: f32) {
        self.weight = if factor > 0.0 {
            self.weight * factor
        } else {
            1.0
        };
        self.mass *= factor;
        self.first.iter_mut().for_each(|value| *value *= factor);
        self.second
            .all_mut()
            .iter_mut()
            .for_each(|value| *value *= factor);
        self.pull
            .all_mut()
            .iter_mut()
            .for_each(|value| *value *= factor);
    }

    /// Adds the codes and residuals of a batch.
    pub fn add(&mut self, slots: &[Slot], pool: &Pool) {
        self.by_atom.iter_mut().for_each(Vec::clear);
        for (at, slot) in slots.iter().enumerate() {
            for row in 0..slot.n_rows() {
                let weight = self.weight * slot.weight(row);
                self.mass += weight;
                let id = (at * Slot::ROWS + row) as u32;
                for code in slot.codes(row) {
                    let value = code.value * weight;
                    self.by_atom[code.index as usize].push((id, value));
                    self.first[code.index as usize] += value;
                    let second = self.second.row_mut(code.index as usize);
                    for other in slot.codes(row) {
                        second[other.index as usize] += value * other.value;
                    }
                }
            }
        }
        let (stride, by_atom) = (self.pull.stride(), &self.by_atom);
        pool.parts(self.pull.all_mut(), TOGETHER * stride, |part, pulls| {
            for (pull, users) in pulls.chunks_mut(stride).zip(&by_atom[part * TOGETHER..]) {
                Arch::new().dispatch(AddRows { pull, users, slots });
            }
        });
    }

    /// Removes an atom from the sums, as if no row had used it.
    pub fn drop_atom(&mut self, atom: usize, values: &[f32]) {
        for other in 0..self.second.n_rows() {
            let shared = std::mem::take(&mut self.second.row_mut(other)[atom]);
            crate::square::product::add_scaled(self.pull.row_mut(other), shared, values);
        }
        self.first[atom] = 0.0;
        self.second.row_mut(atom).fill(0.0);
        self.pull.row_mut(atom).fill(0.0);
    }
}

/// Adds residual rows to one atom's pull, eight vectors at a time.
struct AddRows<'a> {
    pull: &'a mut [f32],
    users: &'a [(u32, f32)],
    slots: &'a [Slot],
}

impl WithSimd for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const WIDE: usize = 8;
        if self.users.is_empty() {
            return;
        }
        for (at, pull) in self.pull.chunks_mut(WIDE * S::F32_LANES).enumerate() {
            let (from, len) = (at * WIDE * S::F32_LANES, pull.len());
            let pull = S::as_mut_simd_f32s(pull).0;
            let mut sums = [simd.splat_f32s(0.0); WIDE];
            sums[..pull.len()].copy_from_slice(pull);
            for &(row, value) in self.users {
                let slot = &self.slots[row as usize / Slot::ROWS];
                let rest = &slot.rest(row as usize % Slot::ROWS)[from..from + len];
                let value = simd.splat_f32s(value);
                for (sum, &rest) in sums.iter_mut().zip(S::as_simd_f32s(rest).0) {
                    *sum = simd.mul_add_f32s(value, rest, *sum);
                }
            }
            pull.copy_from_slice(&sums[..pull.len()]);
        }
    }
}
