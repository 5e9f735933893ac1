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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use crate::square::encode::Codes;
    use crate::square::sheet::Sheet;

    const ROWS: usize = 3 * Slot::ROWS;

    fn random(n_rows: usize, width: usize, seed: u64) -> Matrix {
        let mut rng = Rng::new(seed, 0, 0);
        let flat: Vec<f32> = (0..n_rows * width).map(|_| rng.uniform() as f32).collect();
        Matrix::from_flat(&flat, width)
    }

    /// Sums of some slots of 144 rows over 10 sites, with codes of 5 atoms.
    fn sums(slots: std::ops::Range<usize>, threads: usize) -> Statistics {
        let (rows, codes, atoms) = (random(ROWS, 10, 1), random(ROWS, 5, 2), random(5, 10, 3));
        let starts: Vec<i64> = (0..=ROWS as i64).map(|row| 10 * row).collect();
        let sites: Vec<u32> = (0..10 * ROWS as u32).map(|at| at % 10).collect();
        let values = rows.flat();
        let sheet = Sheet::new(&starts, &sites, &values, 10).unwrap();
        let mut all = Codes::new();
        (0..ROWS).for_each(|row| all.push(&codes.row(row)[..5]));
        let weights = vec![1.0; ROWS];
        let taken = slots.map(|at| {
            let mut slot = Slot::new(5, 10);
            let rows = at * Slot::ROWS..(at + 1) * Slot::ROWS;
            slot.take(&sheet, rows, &all, &weights, &atoms);
            slot
        });
        let mut sums = Statistics::new(5, 10);
        sums.add(&taken.collect::<Vec<_>>(), &Pool::new(threads).unwrap());
        sums
    }

    fn values(sums: &Statistics) -> Vec<f32> {
        let mut all = sums.second.flat();
        all.extend(sums.pull.flat());
        all.extend(&sums.first);
        all.push(sums.mass);
        all
    }

    #[test]
    fn sums_of_shards_add_up_to_one_pass() {
        let whole = values(&sums(0..3, 1));
        let (one, other) = (values(&sums(0..1, 1)), values(&sums(1..3, 1)));
        for ((whole, one), other) in whole.iter().zip(&one).zip(&other) {
            assert!((whole - one - other).abs() <= 2e-5 * whole.abs().max(1.0));
        }
        for threads in [2, 3, 8] {
            assert_eq!(whole, values(&sums(0..3, threads)));
        }
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        let (rows, codes, atoms) = (random(ROWS, 10, 1), random(ROWS, 5, 2), random(5, 10, 3));
        let found = sums(0..3, 1);
        let code = |row: usize, atom: usize| f64::from(codes.row(row)[atom]);
        let rest = |row: usize, site: usize| {
            let made = (0..5).map(|atom| code(row, atom) * f64::from(atoms.row(atom)[site]));
            f64::from(rows.row(row)[site]) - made.sum::<f64>()
        };
        for atom in 0..5 {
            for other in 0..5 {
                let second: f64 = (0..ROWS)
                    .map(|row| code(row, atom) * code(row, other))
                    .sum();
                assert!((f64::from(found.second.row(atom)[other]) - second).abs() < 1e-3);
            }
            for site in 0..10 {
                let pull: f64 = (0..ROWS).map(|row| code(row, atom) * rest(row, site)).sum();
                assert!((f64::from(found.pull.row(atom)[site]) - pull).abs() < 1e-3);
            }
        }
    }
}
