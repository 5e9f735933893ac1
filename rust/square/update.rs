//! The dictionary step: exact block coordinate descent on the sums, in residual form.
//!
//! Atom k moves to the projection of `d_k + U_k / A_kk` onto non-negative vectors of norm at most 1
//! (Mairal et al. 2010, algorithm 2). Atoms are taken 16 at a time: within such a block each step
//! sees the ones before it, and then one matrix product brings U of all atoms up to date.

use pulp::{Arch, Simd, WithSimd};

use crate::parallel::Pool;
use crate::square::matrix::Matrix;
use crate::square::panels::Panels;
use crate::square::product::{Product, Side, sum_of_squares};
use crate::square::statistics::Statistics;

/// Atoms whose share of A is below this are left alone.
const UNUSED: f32 = 1e-9;
/// Atoms of a block.
pub(crate) const BLOCK: usize = 16;
/// Rows of U that one worker brings up to date at a time.
const TOGETHER: usize = 24;

/// Memory for the steps of one block.
#[derive(Debug, Clone)]
pub(crate) struct Steps {
    steps: Matrix,
    shares: Matrix,
}

impl Steps {
    /// Memory for atoms of this number and width.
    pub fn new(n_atoms: usize, n_sites: usize) -> Self {
        Self {
            steps: Matrix::zeros(BLOCK, n_sites),
            shares: Matrix::zeros(n_atoms, BLOCK),
        }
    }

    /// Moves some atoms (at most 16) to their optimum, one after the other.
    pub fn block(&mut self, which: &[u32], atoms: &mut Matrix, sums: &mut Statistics, pool: &Pool) {
        for step in 0..which.len() {
            self.atom(step, which, atoms, sums);
        }
        for (row, shares) in self.shares.all_mut().chunks_mut(BLOCK).enumerate() {
            let second = sums.second.row(row);
            for (share, &atom) in shares.iter_mut().zip(which) {
                *share = -second[atom as usize];
            }
        }
        let (stride, shares, steps) = (sums.pull.stride(), &self.shares, &self.steps);
        pool.parts(sums.pull.all_mut(), TOGETHER * stride, |part, pulls| {
            Product {
                a: Side::new(&shares.all()[part * TOGETHER * BLOCK..], BLOCK),
                b: Side::new(steps.all(), stride),
                n_rows: pulls.len() / stride,
                c: pulls,
                c_stride: stride,
                depth: which.len(),
                width: stride,
            }
            .add();
        });
    }

    fn atom(&mut self, step: usize, which: &[u32], atoms: &mut Matrix, sums: &Statistics) {
        let atom = which[step] as usize;
        let second = sums.second.row(atom);
        let stride = self.steps.stride();
        let (before, fresh) = self.steps.all_mut().split_at_mut(step * stride);
        let fresh = &mut fresh[..stride];
        if second[atom] <= UNUSED * sums.weight {
            fresh.fill(0.0);
            return;
        }
        let mut shares = [0.0; BLOCK];
        for (share, &other) in shares.iter_mut().zip(&which[..step]) {
            *share = -second[other as usize];
        }
        let square = Arch::new().dispatch(Target {
            old: atoms.row(atom),
            pull: sums.pull.row(atom),
            shares: &shares[..step],
            before,
            inverse: 1.0 / second[atom],
            fresh,
        });
        let scale = if square > 1.0 {
            1.0 / square.sqrt()
        } else {
            1.0
        };
        Arch::new().dispatch(Move {
            atom: atoms.row_mut(atom),
            fresh,
            scale,
        });
    }
}

/// Puts `scale` times the fresh atom in the old one's place and the difference in its own.
struct Move<'a> {
    atom: &'a mut [f32],
    fresh: &'a mut [f32],
    scale: f32,
}

impl WithSimd for Move<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let scale = simd.splat_f32s(self.scale);
        let atom = S::as_mut_simd_f32s(self.atom).0;
        let fresh = S::as_mut_simd_f32s(self.fresh).0;
        for (old, fresh) in atom.iter_mut().zip(fresh) {
            let new = simd.mul_f32s(*fresh, scale);
            *fresh = simd.sub_f32s(new, *old);
            *old = new;
        }
    }
}

/// The free optimum of one atom, cut at 0; returns its squared norm.
struct Target<'a> {
    old: &'a [f32],
    pull: &'a [f32],
    /// Minus the shares of A with the atoms moved before, and their steps.
    shares: &'a [f32],
    before: &'a [f32],
    inverse: f32,
    fresh: &'a mut [f32],
}

impl WithSimd for Target<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        const WIDE: usize = 4;
        let wide = WIDE * S::F32_LANES;
        let stride = self.fresh.len();
        let inverse = simd.splat_f32s(self.inverse);
        for (at, fresh) in self.fresh.chunks_mut(wide).enumerate() {
            let columns = at * wide..at * wide + fresh.len();
            let fresh = S::as_mut_simd_f32s(fresh).0;
            let mut sums = [simd.splat_f32s(0.0); WIDE];
            for (sum, &pull) in sums
                .iter_mut()
                .zip(S::as_simd_f32s(&self.pull[columns.clone()]).0)
            {
                *sum = pull;
            }
            for (step, &share) in self.before.chunks_exact(stride).zip(self.shares) {
                let step = S::as_simd_f32s(&step[columns.clone()]).0;
                let share = simd.splat_f32s(share);
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

/// The atoms that promise the most from moving, `A_kk |step|^2`, in ascending order.
///
/// Steps are those to each atom's own optimum. The pull alone would not do: the penalty on codes
/// leaves every atom of norm 1 a pull along itself that it cannot follow.
pub(crate) fn most_promising(atoms: &Matrix, sums: &Statistics, count: usize) -> Vec<u32> {
    let promise = |atom: usize| {
        let second = sums.second.row(atom)[atom];
        if second <= UNUSED * sums.weight {
            return 0.0;
        }
        let [square, product, old] = Arch::new().dispatch(Promise {
            old: atoms.row(atom),
            pull: sums.pull.row(atom),
            inverse: 1.0 / second,
        });
        let scale = 1.0 / square.sqrt().max(1.0);
        second * (scale * (scale * square - 2.0 * product) + old)
    };
    let n_atoms = sums.second.n_rows();
    let mut which: Vec<u32> = (0..n_atoms as u32).collect();
    if count < n_atoms {
        let promises: Vec<f32> = (0..n_atoms).map(promise).collect();
        let promise = |&atom: &u32| promises[atom as usize];
        which.sort_by(|a, b| promise(b).total_cmp(&promise(a)).then(a.cmp(b)));
        which.truncate(count);
        which.sort_unstable();
    }
    which
}

/// Of an atom's free optimum, cut at 0: its square, its product with the old atom, the old square.
struct Promise<'a> {
    old: &'a [f32],
    pull: &'a [f32],
    inverse: f32,
}

impl WithSimd for Promise<'_> {
    type Output = [f32; 3];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f32; 3] {
        const WIDE: usize = 4;
        let zero = simd.splat_f32s(0.0);
        let inverse = simd.splat_f32s(self.inverse);
        let mut sums = [[zero; WIDE]; 3];
        let olds = S::as_simd_f32s(self.old).0.chunks(WIDE);
        for (old, pull) in olds.zip(S::as_simd_f32s(self.pull).0.chunks(WIDE)) {
            for (lane, (&old, &pull)) in old.iter().zip(pull).enumerate() {
                let free = simd.max_f32s(simd.mul_add_f32s(inverse, pull, old), zero);
                sums[0][lane] = simd.mul_add_f32s(free, free, sums[0][lane]);
                sums[1][lane] = simd.mul_add_f32s(free, old, sums[1][lane]);
                sums[2][lane] = simd.mul_add_f32s(old, old, sums[2][lane]);
            }
        }
        sums.map(|sums| {
            let pairs = [
                simd.add_f32s(sums[0], sums[1]),
                simd.add_f32s(sums[2], sums[3]),
            ];
            simd.reduce_sum_f32s(simd.add_f32s(pairs[0], pairs[1]))
        })
    }
}

/// Brings the rows and columns of some atoms in the Gram matrix up to date.
pub(crate) fn refresh_gram(
    which: &[u32],
    atoms: &Matrix,
    panels: &Panels,
    gram: &mut Matrix,
    pool: &Pool,
) {
    let mut fresh = Matrix::zeros(which.len(), gram.width());
    let stride = fresh.stride();
    pool.parts(fresh.all_mut(), TOGETHER * stride, |part, rows| {
        let side = Side {
            data: atoms.all(),
            stride: atoms.stride(),
            picked: Some(&which[part * TOGETHER..]),
        };
        panels.correlate_into(side, rows.len() / stride, (rows, stride));
    });
    for (at, &atom) in which.iter().enumerate() {
        gram.row_mut(atom as usize).copy_from_slice(fresh.row(at));
    }
    for other in 0..gram.n_rows() {
        let row = gram.row_mut(other);
        for (at, &atom) in which.iter().enumerate() {
            row[atom as usize] = fresh.row(at)[other];
        }
    }
}

#[cfg(test)]
mod tests;
