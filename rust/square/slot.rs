//! A few rows of a batch on one worker: coded, and what their codes leave over.

use crate::rows::Entry;
use crate::square::coder::{Coder, Desk};
use crate::square::matrix::Matrix;
use crate::square::panels::Panels;
use crate::square::product::{Side, add_scaled, sum_of_squares};
use crate::square::sheet::Sheet;

/// Rows with a density below this are multiplied entry by entry.
const SPARSE: f64 = 0.25;

/// Memory for some rows, their codes and residuals.
#[derive(Debug)]
pub(crate) struct Slot {
    rows: Matrix,
    products: Matrix,
    desk: Desk,
    starts: Vec<usize>,
    codes: Vec<Entry>,
    /// Sum of codes and half the squared error, over the rows.
    pub cost: [f64; 2],
}

/// What rows are coded with.
#[derive(Clone, Copy)]
pub(crate) struct Tools<'a> {
    pub atoms: &'a Matrix,
    pub panels: &'a Panels,
    pub coder: &'a Coder,
}

impl Slot {
    /// Rows of a slot: eight tiles of the product.
    pub const ROWS: usize = 48;

    /// Empty memory.
    pub fn new(n_atoms: usize, n_sites: usize) -> Self {
        Self {
            rows: Matrix::zeros(Self::ROWS, n_sites),
            products: Matrix::zeros(Self::ROWS, n_atoms),
            desk: Desk::new(n_atoms),
            starts: vec![0],
            codes: Vec::new(),
            cost: [0.0; 2],
        }
    }

    /// Number of rows it holds.
    pub fn n_rows(&self) -> usize {
        self.starts.len() - 1
    }

    /// Codes of a row.
    pub fn codes(&self, row: usize) -> &[Entry] {
        &self.codes[self.starts[row]..self.starts[row + 1]]
    }

    /// The residual of a row, with padding.
    pub fn rest(&self, row: usize) -> &[f32] {
        self.rows.row(row)
    }

    /// Codes rows and leaves their residuals.
    pub fn fill(&mut self, sheet: &Sheet, rows: &[u32], tools: Tools) {
        self.starts.truncate(1);
        self.codes.clear();
        self.cost = [0.0; 2];
        self.correlate(sheet, rows, tools.panels);
        let n_atoms = tools.atoms.n_rows();
        for row in 0..rows.len() {
            self.desk.slopes.copy_from_slice(self.products.row(row));
            tools.coder.code(&mut self.desk);
            for (atom, &value) in self.desk.codes[..n_atoms].iter().enumerate() {
                if value > 0.0 {
                    self.codes.push(Entry { index: atom as u32, value });
                    add_scaled(self.rows.row_mut(row), -value, tools.atoms.row(atom));
                    self.cost[0] += f64::from(value);
                }
            }
            self.starts.push(self.codes.len());
            self.cost[1] += 0.5 * f64::from(sum_of_squares(self.rows.row(row)));
        }
    }

    fn correlate(&mut self, sheet: &Sheet, rows: &[u32], panels: &Panels) {
        for (at, &row) in rows.iter().enumerate() {
            sheet.spread(row as usize, self.rows.row_mut(at));
        }
        if sheet.density() < SPARSE {
            for (at, &row) in rows.iter().enumerate() {
                panels.correlate_sparse(sheet.row(row as usize), self.products.row_mut(at));
            }
        } else {
            self.products.all_mut().fill(0.0);
            let side = Side::new(self.rows.all(), self.rows.stride());
            panels.correlate(side, rows.len(), &mut self.products);
        }
    }
}
