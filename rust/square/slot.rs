//! A few rows of a batch on one worker: coded, and what their codes leave over.

use crate::rows::Entry;
use crate::square::coder::{Coder, Desk};
use crate::square::encode::Codes;
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
    weights: Vec<f32>,
    /// Weighted sum of codes and half the squared error, over the rows.
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
            weights: vec![1.0; Self::ROWS],
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

    /// Weight of a row.
    pub fn weight(&self, row: usize) -> f32 {
        self.weights[row]
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
        for row in 0..rows.len() {
            self.desk.slopes.copy_from_slice(self.products.row(row));
            tools.coder.code(&mut self.desk);
            let used = self
                .desk
                .codes
                .iter()
                .enumerate()
                .filter(|(_, value)| **value > 0.0);
            let entry = |(atom, &value): (usize, &f32)| Entry {
                index: atom as u32,
                value,
            };
            self.codes.extend(used.map(entry));
            self.close(row, tools.atoms);
        }
    }

    /// Takes rows with given codes and weights and leaves their residuals.
    pub fn take(
        &mut self,
        sheet: &Sheet,
        rows: std::ops::Range<usize>,
        codes: &Codes,
        weights: &[f64],
        atoms: &Matrix,
    ) {
        self.starts.truncate(1);
        self.codes.clear();
        self.cost = [0.0; 2];
        for (at, row) in rows.enumerate() {
            sheet.spread(row, self.rows.row_mut(at));
            let (used, values) = codes.row(row);
            let pairs = used.iter().zip(values);
            self.codes
                .extend(pairs.map(|(&index, &value)| Entry { index, value }));
            self.weights[at] = weights[row] as f32;
            self.close(at, atoms);
        }
    }

    /// Subtracts what a row's codes (the last ones) make of it and adds up its cost.
    fn close(&mut self, row: usize, atoms: &Matrix) {
        let weight = f64::from(self.weights[row]);
        for code in &self.codes[self.starts[row]..] {
            add_scaled(
                self.rows.row_mut(row),
                -code.value,
                atoms.row(code.index as usize),
            );
            self.cost[0] += weight * f64::from(code.value);
        }
        self.starts.push(self.codes.len());
        self.cost[1] += 0.5 * weight * f64::from(sum_of_squares(self.rows.row(row)));
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
