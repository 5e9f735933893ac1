//! Dense float32 products: C += A B, with registers holding a tile of C.
//!
//! One kernel serves all: correlations and the Gram matrix (B is a panel of 64 atoms, site by site)
//! and the dictionary update (B is a block of steps). Every value of C is summed in the order of
//! the depth, whatever rows are worked on together, so results do not depend on the grouping.

use pulp::{Arch, Simd, WithSimd};

/// Depth done at a time: a panel's piece of it (32 kB) stays in the nearest cache.
const DEPTH: usize = 128;
/// Rows of a tile.
const ROWS: usize = 6;

/// Rows of a dense matrix: row `i` begins at `i * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    /// Only these rows, in this order.
    pub picked: Option<&'a [u32]>,
}

impl<'a> Side<'a> {
    /// Consecutive rows.
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        Self {
            data,
            stride,
            picked: None,
        }
    }

    #[inline(always)]
    fn start(&self, row: usize) -> usize {
        self.picked.map_or(row, |picked| picked[row] as usize) * self.stride
    }
}

/// C (`n_rows` x width) += A (`n_rows` x depth) B (depth x width); width in whole cache lines.
pub(crate) struct Product<'a> {
    pub a: Side<'a>,
    pub b: Side<'a>,
    pub c: &'a mut [f32],
    pub c_stride: usize,
    pub n_rows: usize,
    pub depth: usize,
    pub width: usize,
}

impl Product<'_> {
    /// Adds the product to C.
    pub fn add(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            run::<S, 4>(simd, &mut self);
        } else {
            run::<S, 2>(simd, &mut self);
        }
    }
}

#[inline(always)]
fn run<S: Simd, const V: usize>(simd: S, product: &mut Product) {
    for from in (0..product.depth).step_by(DEPTH) {
        let to = (from + DEPTH).min(product.depth);
        let mut column = 0;
        while column + V * S::F32_LANES <= product.width {
            strip::<S, V>(simd, product, from..to, column);
            column += V * S::F32_LANES;
        }
        while column < product.width {
            strip::<S, 1>(simd, product, from..to, column);
            column += S::F32_LANES;
        }
    }
}

/// All rows of C in the columns of one tile.
#[inline(always)]
fn strip<S: Simd, const V: usize>(
    simd: S,
    product: &mut Product,
    depth: std::ops::Range<usize>,
    column: usize,
) {
    let (n_rows, a, width) = (product.n_rows, product.a, V * S::F32_LANES);
    for first in (0..n_rows).step_by(ROWS) {
        // A tile that hangs over repeats the last row; what it makes is dropped.
        let rows: [&[f32]; ROWS] = std::array::from_fn(|i| {
            let at = a.start((first + i).min(n_rows - 1));
            &a.data[at + depth.start..at + depth.end]
        });
        let b = &product.b.data[depth.start * product.b.stride + column..];
        let tile = tile::<S, V>(simd, rows, b, product.b.stride);
        for (i, sums) in tile.iter().enumerate().take(n_rows - first) {
            let at = (first + i) * product.c_stride + column;
            let out = S::as_mut_simd_f32s(&mut product.c[at..at + width]).0;
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = simd.add_f32s(*out, sum);
            }
        }
    }
}

#[inline(always)]
#[allow(
    clippy::needless_range_loop,
    reason = "plain indices are what the compiler turns into registers"
)]
fn tile<S: Simd, const V: usize>(
    simd: S,
    a: [&[f32]; ROWS],
    b: &[f32],
    stride: usize,
) -> [[S::f32s; V]; ROWS] {
    let depth = a[0].len();
    let a = a.map(|row| &row[..depth]);
    let mut sums = [[simd.splat_f32s(0.0); V]; ROWS];
    let mut at = 0;
    for k in 0..depth {
        let row = &S::as_simd_f32s(&b[at..at + V * S::F32_LANES]).0[..V];
        for i in 0..ROWS {
            let value = simd.splat_f32s(a[i][k]);
            for v in 0..V {
                sums[i][v] = simd.mul_add_f32s(value, row[v], sums[i][v]);
            }
        }
        at += stride;
    }
    sums
}

/// y += factor x.
pub(crate) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    Arch::new().dispatch(AddScaled { y, factor, x });
}

struct AddScaled<'a> {
    y: &'a mut [f32],
    factor: f32,
    x: &'a [f32],
}

impl WithSimd for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let factor = simd.splat_f32s(self.factor);
        let (y, rest_y) = S::as_mut_simd_f32s(self.y);
        let (x, rest_x) = S::as_simd_f32s(self.x);
        for (y, x) in y.iter_mut().zip(x) {
            *y = simd.mul_add_f32s(factor, *x, *y);
        }
        for (y, x) in rest_y.iter_mut().zip(rest_x) {
            *y += self.factor * x;
        }
    }
}

/// Sum of squares, in float32 lanes.
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    Arch::new().dispatch(Squares(x))
}

/// Scales values to Euclidean norm 1, unless all are zero.
pub(crate) fn to_norm_one(values: &mut [f32]) {
    // By the largest first: squares of tiny values would lose their bits.
    let largest = values
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    if largest > 0.0 {
        divide(values, largest);
        divide(values, sum_of_squares(values).sqrt());
    }
}

fn divide(values: &mut [f32], by: f32) {
    for value in values {
        *value /= by;
    }
}

struct Squares<'a>(&'a [f32]);

impl WithSimd for Squares<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.0);
        let mut sums = [simd.splat_f32s(0.0); 4];
        for four in x.chunks(4) {
            for (sum, &x) in sums.iter_mut().zip(four) {
                *sum = simd.mul_add_f32s(x, x, *sum);
            }
        }
        let left = simd.add_f32s(sums[0], sums[1]);
        let right = simd.add_f32s(sums[2], sums[3]);
        let tail: f32 = rest.iter().map(|x| x * x).sum();
        simd.reduce_sum_f32s(simd.add_f32s(left, right)) + tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::square::matrix::Matrix;
    use proptest::prelude::*;

    fn value(i: usize) -> f32 {
        ((i * 7919) % 17) as f32 - 8.0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_three_loops(n_rows in 1_usize..15, depth in 1_usize..300, lines in 1_usize..10) {
            let width = 16 * lines;
            let a = Matrix::from_flat(&(0..n_rows * depth).map(value).collect::<Vec<_>>(), depth);
            let b = Matrix::from_flat(&(0..depth * width).map(value).collect::<Vec<_>>(), width);
            let mut c = Matrix::zeros(n_rows, width);
            c.all_mut().fill(1.0);
            Product {
                a: Side::new(a.all(), a.stride()),
                b: Side::new(b.all(), b.stride()),
                c_stride: c.stride(),
                c: c.all_mut(),
                n_rows, depth, width,
            }.add();
            for i in 0..n_rows {
                for j in 0..width {
                    let slow: f32 = (0..depth).map(|k| a.row(i)[k] * b.row(k)[j]).sum();
                    // Whole numbers below 2^24 add up exactly in any order.
                    prop_assert_eq!(c.row(i)[j].to_bits(), (1.0 + slow).to_bits());
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same() {
        let values: Vec<f32> = (0..40 * 80).map(value).collect();
        let (a, b) = (
            Matrix::from_flat(&values[..7 * 40], 40),
            Matrix::from_flat(&values, 80),
        );
        let run = |scalar: bool| {
            let mut c = Matrix::zeros(7, 80);
            let product = Product {
                a: Side::new(a.all(), a.stride()),
                b: Side::new(b.all(), b.stride()),
                c_stride: c.stride(),
                c: c.all_mut(),
                n_rows: 7,
                depth: 40,
                width: 80,
            };
            if scalar {
                product.with_simd(pulp::Scalar);
            } else {
                product.add();
            }
            c.flat()
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn scaled_sums_by_hand() {
        let mut y = vec![1.0; 19];
        let x: Vec<f32> = (0..19).map(|i| i as f32).collect();
        add_scaled(&mut y, 2.0, &x);
        assert!(
            y.iter()
                .enumerate()
                .all(|(i, y)| (y - (1.0 + 2.0 * i as f32)).abs() < 1e-6)
        );
        assert!((sum_of_squares(&x) - 2109.0).abs() < 1e-3);
    }

    #[test]
    fn tiny_and_large_values_have_norm_one() {
        for size in [1e-44_f32, 1e-30, 1e-22, 1.0, 1e9, 1e30] {
            let mut values = [3.0 * size, 4.0 * size];
            to_norm_one(&mut values);
            let close = |value: f32, expected: f32| (value - expected).abs() < 0.1;
            assert!(
                close(values[0], 0.6) && close(values[1], 0.8),
                "{size} {values:?}"
            );
        }
        let mut zeros = [0.0_f32; 2];
        to_norm_one(&mut zeros);
        assert!(zeros.iter().all(|value| value.to_bits() == 0));
    }
}
