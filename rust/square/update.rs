//! The dictionary step: exact block coordinate descent on the sums, in residual form.
//!
//! Atom k moves to the projection of `d_k + U_k / A_kk` onto non-negative vectors of norm at most 1
//! (Mairal et al. 2010, algorithm 2). Atoms are taken 16 at a time: within such a line each step
//! sees the ones before it, and then one matrix product brings U of all atoms up to date.

use pulp::{Arch, Simd, WithSimd};

use crate::parallel::Pool;
use crate::square::matrix::{LINE, Matrix};
use crate::square::product::{Product, Side, add_scaled, sum_of_squares};
use crate::square::statistics::Statistics;

/// Atoms whose share of A is below this are left alone.
const UNUSED: f32 = 1e-9;
/// Rows of U that one worker brings up to date at a time.
const TOGETHER: usize = 24;

/// Memory for the steps of one line.
#[derive(Debug, Clone)]
pub(crate) struct Steps {
    steps: Matrix,
    shares: Matrix,
    fresh: Matrix,
}

impl Steps {
    /// Memory for atoms of this number and width.
    pub fn new(n_atoms: usize, n_sites: usize) -> Self {
        Self {
            steps: Matrix::zeros(LINE, n_sites),
            shares: Matrix::zeros(n_atoms, LINE),
            fresh: Matrix::zeros(1, n_sites),
        }
    }

    /// Moves the atoms of one line to their optimum, one after the other.
    pub fn line(&mut self, line: usize, atoms: &mut Matrix, sums: &mut Statistics, pool: &Pool) {
        let range = line * LINE..((line + 1) * LINE).min(atoms.n_rows());
        for (step, atom) in range.clone().enumerate() {
            self.atom((step, atom, range.start), atoms, sums);
        }
        for (row, shares) in self.shares.all_mut().chunks_mut(LINE).enumerate() {
            let second = &sums.second.row(row)[range.clone()];
            for (share, &second) in shares.iter_mut().zip(second) {
                *share = -second;
            }
        }
        let (stride, shares, steps) = (sums.pull.stride(), &self.shares, &self.steps);
        pool.parts(sums.pull.all_mut(), TOGETHER * stride, |part, pulls| {
            Product {
                a: Side { data: &shares.all()[part * TOGETHER * LINE..], stride: LINE },
                b: Side { data: steps.all(), stride },
                n_rows: pulls.len() / stride,
                c: pulls,
                c_stride: stride,
                depth: range.len(),
                width: stride,
            }
            .add();
        });
    }

    fn atom(&mut self, place: (usize, usize, usize), atoms: &mut Matrix, sums: &Statistics) {
        let (step, atom, first) = place;
        let second = sums.second.row(atom);
        if second[atom] <= UNUSED * sums.weight {
            self.steps.row_mut(step).fill(0.0);
            return;
        }
        let square = Arch::new().dispatch(Target {
            old: atoms.row(atom),
            pull: sums.pull.row(atom),
            before: &second[first..atom],
            steps: &self.steps,
            inverse: 1.0 / second[atom],
            fresh: self.fresh.row_mut(0),
        });
        let scale = if square > 1.0 { 1.0 / square.sqrt() } else { 1.0 };
        let out = self.steps.row_mut(step).iter_mut().zip(atoms.row_mut(atom));
        for ((step, old), fresh) in out.zip(self.fresh.row(0)) {
            let new = fresh * scale;
            *step = new - *old;
            *old = new;
        }
    }
}

/// The free optimum of one atom, cut at 0; returns its squared norm.
struct Target<'a> {
    old: &'a [f32],
    pull: &'a [f32],
    before: &'a [f32],
    steps: &'a Matrix,
    inverse: f32,
    fresh: &'a mut [f32],
}

impl WithSimd for Target<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        const WIDE: usize = 4;
        let wide = WIDE * S::F32_LANES;
        let inverse = simd.splat_f32s(self.inverse);
        for (at, fresh) in self.fresh.chunks_mut(wide).enumerate() {
            let columns = at * wide..at * wide + fresh.len();
            let fresh = S::as_mut_simd_f32s(fresh).0;
            let mut sums = [simd.splat_f32s(0.0); WIDE];
            for (sum, &pull) in sums.iter_mut().zip(S::as_simd_f32s(&self.pull[columns.clone()]).0) {
                *sum = pull;
            }
            for (before, &share) in self.before.iter().enumerate() {
                let step = S::as_simd_f32s(&self.steps.row(before)[columns.clone()]).0;
                let share = simd.splat_f32s(-share);
                for (sum, &step) in sums.iter_mut().zip(step) {
                    *sum = simd.mul_add_f32s(share, step, *sum);
                }
            }
            let old = S::as_simd_f32s(&self.old[columns]).0;
            for ((fresh, &sum), &old) in fresh.iter_mut().zip(&sums).zip(old) {
                let free = simd.mul_add_f32s(inverse, sum, old);
                *fresh = simd.max_f32s(free, simd.splat_f32s(0.0));
            }
        }
        sum_of_squares(self.fresh)
    }
}

/// Gain that moving each line promises, largest first: sum of `|U_k|^2 / A_kk`.
pub(crate) fn by_promise(sums: &Statistics) -> Vec<usize> {
    let promise = |atom: usize| {
        let second = sums.second.row(atom)[atom];
        if second <= UNUSED * sums.weight {
            return 0.0;
        }
        sum_of_squares(sums.pull.row(atom)) / second
    };
    let n_atoms = sums.second.n_rows();
    let line = |line: usize| -> f32 {
        (line * LINE..((line + 1) * LINE).min(n_atoms)).map(promise).sum()
    };
    let promises: Vec<f32> = (0..n_atoms.div_ceil(LINE)).map(line).collect();
    let mut lines: Vec<usize> = (0..promises.len()).collect();
    lines.sort_by(|&a, &b| promises[b].total_cmp(&promises[a]).then(a.cmp(&b)));
    lines
}

/// Brings the rows and columns of one line of the Gram matrix up to date.
pub(crate) fn refresh_gram(
    line: usize,
    atoms: &Matrix,
    panels: &crate::square::panels::Panels,
    gram: &mut Matrix,
) {
    let range = line * LINE..((line + 1) * LINE).min(atoms.n_rows());
    let mut fresh = Matrix::zeros(range.len(), gram.width());
    let side = Side {
        data: &atoms.all()[range.start * atoms.stride()..],
        stride: atoms.stride(),
    };
    panels.correlate(side, range.len(), &mut fresh);
    for (at, atom) in range.clone().enumerate() {
        gram.row_mut(atom).copy_from_slice(fresh.row(at));
    }
    for other in 0..gram.n_rows() {
        for (at, atom) in range.clone().enumerate() {
            gram.row_mut(other)[atom] = fresh.row(at)[other];
        }
    }
}

/// U += A D: turns the residual form into B, for a check or another dictionary.
pub(crate) fn to_products(sums: &Statistics, atoms: &Matrix) -> Matrix {
    let mut products = sums.pull.clone();
    for atom in 0..atoms.n_rows() {
        for (other, &share) in sums.second.row(atom)[..atoms.n_rows()].iter().enumerate() {
            add_scaled(products.row_mut(atom), share, atoms.row(other));
        }
    }
    products
}
