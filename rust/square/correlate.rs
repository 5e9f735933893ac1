//! Correlations of row blocks with all atoms, by whichever product is cheapest.

use crate::square::matrix::{Aligned, Matrix, padded};
use crate::square::panels::Panels;
use crate::square::product::Side;
use crate::square::sheet::Sheet;
use crate::square::thin::{BLOCK, Thin};

/// Cost of a multiplication with one stored entry of a row, against the dense product's.
const ROW_COST: f64 = 4.0;
/// Cost of a multiplication with one stored entry of an atom, against the dense product's.
const ATOM_COST: f64 = 3.0;

/// The dictionary in the form that suits it and the rows.
pub(crate) enum Correlator {
    /// Dense rows, dense atoms.
    Dense(Panels),
    /// Only the stored entries of rows.
    SparseRows(Panels),
    /// Only the non-zeros of atoms.
    SparseAtoms(Thin),
}

/// A block of rows and its correlations.
pub(crate) struct Block {
    rows: Aligned,
    products: Aligned,
    transposed: bool,
    stride: usize,
}

impl Correlator {
    /// The cheapest for this dictionary and rows of this density.
    pub fn new(atoms: &Matrix, row_density: f64) -> Self {
        let filled = atoms.all().iter().filter(|value| **value != 0.0).count();
        let atom_density = filled as f64 / (atoms.n_rows() * atoms.width()).max(1) as f64;
        let (by_row, by_atom) = (ROW_COST * row_density, ATOM_COST * atom_density);
        if by_atom < by_row.min(1.0) {
            Self::SparseAtoms(Thin::new(atoms))
        } else if by_row < 1.0 {
            Self::SparseRows(Panels::new(atoms))
        } else {
            Self::Dense(Panels::new(atoms))
        }
    }

    /// Memory for one block.
    pub fn block(&self, n_sites: usize, n_atoms: usize) -> Block {
        let n_values = match self {
            Self::Dense(_) | Self::SparseAtoms(_) => padded(n_sites) * BLOCK,
            Self::SparseRows(_) => 0,
        };
        Block {
            rows: Aligned::filled(n_values, 0.0),
            products: Aligned::filled(padded(n_atoms) * BLOCK, 0.0),
            transposed: matches!(self, Self::SparseAtoms(_)),
            stride: padded(n_atoms),
        }
    }

    /// Correlations of rows `from..to`, at most 48 of them.
    pub fn correlate(&self, sheet: &Sheet, rows: std::ops::Range<usize>, block: &mut Block) {
        match self {
            Self::Dense(panels) => {
                let stride = padded(sheet.n_sites());
                for (row, dense) in rows.clone().zip(block.rows.chunks_mut(stride)) {
                    sheet.spread(row, dense);
                }
                block.products.fill(0.0);
                let side = Side::new(&block.rows, stride);
                panels.correlate_into(side, rows.len(), (&mut block.products, block.stride));
            }
            Self::SparseRows(panels) => {
                for (row, out) in rows.zip(block.products.chunks_mut(block.stride)) {
                    panels.correlate_sparse(sheet.row(row), out);
                }
            }
            Self::SparseAtoms(thin) => {
                let out: &mut [f32] = &mut block.rows;
                out.fill(0.0);
                for (at, row) in rows.enumerate() {
                    let (sites, values) = sheet.row(row);
                    for (&site, &value) in sites.iter().zip(values) {
                        out[site as usize * BLOCK + at] = value;
                    }
                }
                thin.correlate(&block.rows, &mut block.products);
            }
        }
    }
}

impl Block {
    /// Correlations of one row of the block, into `out`; what pads it is left alone.
    pub fn products(&self, row: usize, out: &mut [f32], n_atoms: usize) {
        if self.transposed {
            for (out, rows) in out[..n_atoms]
                .iter_mut()
                .zip(self.products.chunks_exact(BLOCK))
            {
                *out = rows[row];
            }
        } else {
            out[..n_atoms].copy_from_slice(&self.products[row * self.stride..][..n_atoms]);
        }
    }
}

/// Products of all atoms with each other.
pub(crate) fn gram(atoms: &Matrix, panels: &Panels) -> Matrix {
    let mut gram = Matrix::zeros(atoms.n_rows(), atoms.n_rows());
    let side = Side::new(atoms.all(), atoms.stride());
    panels.correlate(side, atoms.n_rows(), &mut gram);
    gram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_agree() {
        let (n_atoms, n_sites, n_rows) = (70, 37, 51);
        let flat: Vec<f32> = (0..n_atoms * n_sites)
            .map(|i| if i % 3 == 0 { (i % 7) as f32 } else { 0.0 })
            .collect();
        let atoms = Matrix::from_flat(&flat, n_sites);
        let starts: Vec<i64> = (0..=51_i64).map(|row| row * 5).collect();
        let sites: Vec<u32> = (0..n_rows as u32)
            .flat_map(|row| (0..5).map(move |i| row % 7 + 6 * i))
            .collect();
        let values: Vec<f32> = (0..sites.len()).map(|i| (i % 4 + 1) as f32).collect();
        let sheet = Sheet::new(&starts, &sites, &values, n_sites).unwrap();
        let ways = [
            Correlator::Dense(Panels::new(&atoms)),
            Correlator::SparseRows(Panels::new(&atoms)),
            Correlator::SparseAtoms(Thin::new(&atoms)),
        ];
        for way in ways {
            let mut block = way.block(n_sites, n_atoms);
            let mut out = vec![0.0; n_atoms];
            for (from, to) in [(0, 48), (48, 51)] {
                way.correlate(&sheet, from..to, &mut block);
                for row in from..to {
                    block.products(row - from, &mut out, n_atoms);
                    let mut dense = vec![0.0; n_sites];
                    sheet.spread(row, &mut dense);
                    for (atom, &found) in out.iter().enumerate() {
                        let own = &atoms.row(atom)[..n_sites];
                        let slow: f32 = own.iter().zip(&dense).map(|(a, x)| a * x).sum();
                        assert!((found - slow).abs() < 1e-4);
                    }
                }
            }
        }
    }

    #[test]
    fn the_cheapest_way_is_taken() {
        let full = Matrix::from_flat(&[1.0; 40], 10);
        let mut thin = Matrix::zeros(4, 10);
        thin.row_mut(0)[3] = 1.0;
        assert!(matches!(Correlator::new(&full, 0.4), Correlator::Dense(_)));
        assert!(matches!(
            Correlator::new(&full, 0.1),
            Correlator::SparseRows(_)
        ));
        assert!(matches!(
            Correlator::new(&thin, 0.4),
            Correlator::SparseAtoms(_)
        ));
    }
}
