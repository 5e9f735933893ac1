//! The dictionary site by site, 64 atoms a panel: what correlations are read from.

use pulp::{Arch, Simd, WithSimd};

use crate::square::matrix::{LINE, Matrix, padded};
use crate::square::product::{Product, Side};

/// Atoms of a panel: four vectors of 16.
const PANEL: usize = 64;

/// Transposed atoms: panel `b` holds (`n_sites`, 64) values of the atoms from `64 b`.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    panels: Vec<Matrix>,
    n_sites: usize,
}

impl Panels {
    /// The transpose of atoms (`n_atoms`, `n_sites`).
    pub fn new(atoms: &Matrix) -> Self {
        let mut panels = Self::empty(atoms.n_rows(), atoms.width());
        for line in 0..atoms.n_rows().div_ceil(LINE) {
            panels.refresh(atoms, line);
        }
        panels
    }

    /// Panels of zeros.
    pub fn empty(n_atoms: usize, n_sites: usize) -> Self {
        let width = |first: usize| padded((n_atoms - first).min(PANEL));
        let panels = (0..n_atoms)
            .step_by(PANEL)
            .map(|first| Matrix::zeros(n_sites, width(first)));
        Self {
            panels: panels.collect(),
            n_sites,
        }
    }

    /// Takes over the 16 atoms from `16 line`.
    pub fn refresh(&mut self, atoms: &Matrix, line: usize) {
        let panel = &mut self.panels[line * LINE / PANEL];
        let rows: [&[f32]; LINE] = std::array::from_fn(|i| match line * LINE + i {
            atom if atom < atoms.n_rows() => atoms.row(atom),
            _ => &[],
        });
        let (stride, offset) = (panel.stride(), line * LINE % PANEL);
        let out = panel.all_mut();
        Arch::new().dispatch(Transpose {
            rows,
            out,
            stride,
            offset,
        });
    }

    /// Adds the correlations of dense rows with all atoms to `out`.
    pub fn correlate(&self, rows: Side, n_rows: usize, out: &mut Matrix) {
        let stride = out.stride();
        self.correlate_into(rows, n_rows, (out.all_mut(), stride));
    }

    /// The same into rows `stride` apart.
    pub fn correlate_into(&self, rows: Side, n_rows: usize, (out, c_stride): (&mut [f32], usize)) {
        for (at, panel) in self.panels.iter().enumerate() {
            Product {
                a: rows,
                b: Side::new(panel.all(), panel.stride()),
                c: &mut out[at * PANEL..],
                c_stride,
                n_rows,
                depth: self.n_sites,
                width: panel.stride(),
            }
            .add();
        }
    }

    /// Correlations of one sparse row with all atoms.
    pub fn correlate_sparse(&self, (sites, values): (&[u32], &[f32]), out: &mut [f32]) {
        for (at, panel) in self.panels.iter().enumerate() {
            let out = &mut out[at * PANEL..at * PANEL + panel.stride()];
            Arch::new().dispatch(SparseRow {
                sites,
                values,
                panel,
                out,
            });
        }
    }
}

struct Transpose<'a> {
    rows: [&'a [f32]; LINE],
    out: &'a mut [f32],
    stride: usize,
    offset: usize,
}

impl WithSimd for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let sites = self.out.chunks_mut(self.stride * LINE);
        for (at, square) in sites.enumerate() {
            let mut block = [[0.0_f32; LINE]; LINE];
            for (row, block) in self.rows.iter().zip(&mut block) {
                if !row.is_empty() {
                    block.copy_from_slice(&row[at * LINE..(at + 1) * LINE]);
                }
            }
            for (site, out) in square.chunks_mut(self.stride).enumerate() {
                let line: [f32; LINE] = std::array::from_fn(|i| block[i][site]);
                out[self.offset..self.offset + LINE].copy_from_slice(&line);
            }
        }
    }
}

struct SparseRow<'a> {
    sites: &'a [u32],
    values: &'a [f32],
    panel: &'a Matrix,
    out: &'a mut [f32],
}

impl WithSimd for SparseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = S::F32_LANES;
        let (mut column, width) = (0, self.panel.stride());
        while column + 4 * lanes <= width {
            let sums = gather::<S, 4>(simd, &self, column);
            store(simd, sums, &mut self.out[column..]);
            column += 4 * lanes;
        }
        while column < width {
            let sums = gather::<S, 1>(simd, &self, column);
            store(simd, sums, &mut self.out[column..]);
            column += lanes;
        }
    }
}

/// Sum over the row's sites of value times the panel's line; even and odd places apart, so that
/// one sum need not wait for the other.
#[inline(always)]
fn gather<S: Simd, const V: usize>(simd: S, row: &SparseRow, column: usize) -> [S::f32s; V] {
    let mut even = [simd.splat_f32s(0.0); V];
    let mut odd = even;
    let (sites, last_site) = row.sites.as_chunks::<2>();
    let (values, last_value) = row.values.as_chunks::<2>();
    for (sites, values) in sites.iter().zip(values) {
        even = add(simd, even, row.line::<S>(sites[0], column), values[0]);
        odd = add(simd, odd, row.line::<S>(sites[1], column), values[1]);
    }
    for (&site, &value) in last_site.iter().zip(last_value) {
        even = add(simd, even, row.line::<S>(site, column), value);
    }
    std::array::from_fn(|v| simd.add_f32s(even[v], odd[v]))
}

impl SparseRow<'_> {
    /// The panel's values at a site from some column.
    #[inline(always)]
    fn line<S: Simd>(&self, site: u32, column: usize) -> &[S::f32s] {
        let (from, to) = (site as usize * self.panel.stride(), self.panel.stride());
        S::as_simd_f32s(&self.panel.all()[from + column..from + to]).0
    }
}

#[inline(always)]
fn add<S: Simd, const V: usize>(
    simd: S,
    mut sums: [S::f32s; V],
    line: &[S::f32s],
    value: f32,
) -> [S::f32s; V] {
    let (value, line) = (simd.splat_f32s(value), &line[..V]);
    for v in 0..V {
        sums[v] = simd.mul_add_f32s(value, line[v], sums[v]);
    }
    sums
}

#[inline(always)]
fn store<S: Simd, const V: usize>(_: S, sums: [S::f32s; V], out: &mut [f32]) {
    S::as_mut_simd_f32s(&mut out[..V * S::F32_LANES])
        .0
        .copy_from_slice(&sums);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn atoms(n_atoms: usize, n_sites: usize) -> Matrix {
        let flat: Vec<f32> = (0..n_atoms * n_sites)
            .map(|i| ((i * 7919) % 11) as f32)
            .collect();
        Matrix::from_flat(&flat, n_sites)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn both_ways_equal_dot_products(n_atoms in 1_usize..150, n_sites in 1_usize..60, skip in 1_usize..5) {
            let atoms = atoms(n_atoms, n_sites);
            let panels = Panels::new(&atoms);
            let sites: Vec<u32> = (0..n_sites as u32).step_by(skip).collect();
            let values: Vec<f32> = sites.iter().map(|site| (site % 5) as f32).collect();
            let mut row = Matrix::zeros(1, n_sites);
            for (&site, &value) in sites.iter().zip(&values) {
                row.row_mut(0)[site as usize] = value;
            }
            let (mut dense, mut sparse) = (Matrix::zeros(1, n_atoms), Matrix::zeros(1, n_atoms));
            panels.correlate(Side::new(row.all(), row.stride()), 1, &mut dense);
            panels.correlate_sparse((&sites, &values), sparse.row_mut(0));
            for atom in 0..n_atoms {
                let slow: f32 = atoms.row(atom).iter().zip(row.row(0)).map(|(a, x)| a * x).sum();
                prop_assert_eq!(dense.row(0)[atom].to_bits(), slow.to_bits());
                prop_assert_eq!(sparse.row(0)[atom].to_bits(), slow.to_bits());
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same() {
        let panels = Panels::new(&atoms(70, 9));
        let (sites, values) = ([0, 2, 5, 6, 8], [1.0, 2.0, 3.0, 4.0, 5.0]);
        for panel in &panels.panels {
            let run = |scalar: bool| {
                let mut out = vec![0.0; panel.stride()];
                let row = SparseRow {
                    sites: &sites,
                    values: &values,
                    panel,
                    out: &mut out,
                };
                if scalar {
                    row.with_simd(pulp::Scalar);
                } else {
                    Arch::new().dispatch(row);
                }
                out
            };
            assert_eq!(run(true), run(false));
        }
    }
}
