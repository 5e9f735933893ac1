//! Exact block steps on the whole objective of one level, at rows that are all at hand.
//!
//! An iteration moves the atoms (from A and B), then every row's codes under the present caps, then
//! every atom's cap together with its codes. None of these can raise the objective.

use crate::objective::Terms;
use crate::parallel::Pool;
use crate::square::caps::{Wish, best_cap};
use crate::square::coder::{Coder, Desk};
use crate::square::correlate::{Correlator, gram};
use crate::square::encode::Codes;
use crate::square::matrix::Matrix;
use crate::square::panels::Panels;
use crate::square::product::sum_of_squares;
use crate::square::sheet::Sheet;
use crate::square::slot::Slot;
use crate::square::statistics::Statistics;
use crate::square::thin::BLOCK as ROWS;
use crate::square::update::{BLOCK, Steps};

/// Sweeps over the atoms in one iteration.
const SWEEPS: usize = 2;
/// Row blocks summed together.
const SLOTS: usize = 8;
/// Coder tolerance of the exact steps.
const TOLERANCE: f32 = 1e-4;

/// Weights of the objective's terms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights {
    /// Weight of the sum of largest codes, s.
    pub size: f64,
    /// lambda 1.
    pub sparsity: f64,
    /// lambda 2.
    pub reconstruction: f64,
}

/// Rows with their weights, and the atoms and codes that explain them.
#[derive(Debug, Clone)]
pub(crate) struct Level<'a> {
    pub sheet: Sheet<'a>,
    pub row_weights: Vec<f64>,
    pub atoms: Matrix,
    pub codes: Codes,
    /// Largest code of each atom.
    pub peaks: Vec<f32>,
    pub terms: Terms,
    pub weights: Weights,
    pub sums: Statistics,
}

impl<'a> Level<'a> {
    /// Codes the rows with given atoms and settles the caps.
    pub fn new(
        sheet: Sheet<'a>,
        row_weights: Vec<f64>,
        atoms: Matrix,
        weights: Weights,
        pool: &Pool,
    ) -> Self {
        let mut codes = Codes::new();
        codes.starts = vec![0; sheet.len() + 1];
        let mut level = Self::coded(sheet, row_weights, atoms, codes, weights);
        level.recode(pool);
        level.sum_up(pool);
        level
    }

    /// Rows with given codes, nothing summed up yet.
    pub fn coded(
        sheet: Sheet<'a>,
        row_weights: Vec<f64>,
        atoms: Matrix,
        codes: Codes,
        weights: Weights,
    ) -> Self {
        Self {
            sums: Statistics::new(atoms.n_rows(), atoms.width()),
            peaks: vec![f32::INFINITY; atoms.n_rows()],
            terms: Terms::default(),
            sheet,
            row_weights,
            atoms,
            codes,
            weights,
        }
    }

    /// The weight in whose units the rows are summed.
    pub fn largest_weight(&self) -> f64 {
        let weights = self.row_weights.iter().copied();
        weights.fold(0.0, f64::max).max(f64::MIN_POSITIVE)
    }

    /// One round of block steps.
    pub fn improve(&mut self, pool: &Pool) {
        self.move_atoms(pool);
        self.recode(pool);
        self.sum_up(pool);
    }

    /// Atoms to their optimum given the codes, then every atom to norm 1 and its codes inversely:
    /// the product stays, sparsity and dictionary size fall.
    fn move_atoms(&mut self, pool: &Pool) {
        let n_atoms = self.atoms.n_rows();
        let mut steps = Steps::new(n_atoms, self.atoms.width());
        let all: Vec<u32> = (0..n_atoms as u32).collect();
        for _ in 0..SWEEPS {
            for block in all.chunks(BLOCK) {
                steps.block(block, &mut self.atoms, &mut self.sums, pool);
            }
        }
        let mut factors = vec![1.0; n_atoms];
        for (atom, factor) in factors.iter_mut().enumerate() {
            let norm = sum_of_squares(self.atoms.row(atom)).sqrt();
            if norm > 1e-6 && norm < 1.0 {
                *factor = norm;
                self.peaks[atom] *= norm;
                self.atoms
                    .row_mut(atom)
                    .iter_mut()
                    .for_each(|value| *value /= norm);
            }
        }
        for (&atom, value) in self.codes.atoms.iter().zip(&mut self.codes.values) {
            *value *= factors[atom as usize];
        }
    }

    /// Better codes for every row under the present caps, then better caps.
    pub fn recode(&mut self, pool: &Pool) {
        let panels = Panels::new(&self.atoms);
        let penalty = (self.weights.sparsity / self.weights.reconstruction) as f32;
        let mut coder = Coder::new(gram(&self.atoms, &panels), penalty, TOLERANCE);
        if self.weights.size > 0.0 {
            coder.set_caps(&self.peaks);
        }
        let mut products = self.code_rows(&coder, pool);
        if self.weights.size > 0.0 {
            self.settle(&coder, &mut products);
        }
        self.tighten();
    }

    /// Codes all rows from where they are; returns each code's correlation of row and atom.
    fn code_rows(&mut self, coder: &Coder, pool: &Pool) -> Vec<f32> {
        let correlator = Correlator::new(&self.atoms, self.sheet.density());
        let (n_atoms, sheet, old) = (self.atoms.n_rows(), self.sheet, &self.codes);
        let desk = || {
            let block = correlator.block(sheet.n_sites(), n_atoms);
            (block, Desk::new(n_atoms), vec![0.0; n_atoms])
        };
        let parts = pool.map(
            sheet.len().div_ceil(ROWS),
            desk,
            |(block, desk, row_products), at| {
                let rows = at * ROWS..((at + 1) * ROWS).min(sheet.len());
                correlator.correlate(&sheet, rows.clone(), block);
                let (mut codes, mut products) = (Codes::new(), Vec::new());
                for row in rows.clone() {
                    block.products(row - rows.start, row_products, n_atoms);
                    desk.slopes[..n_atoms].copy_from_slice(row_products);
                    desk.codes.fill(0.0);
                    let (atoms, values) = old.row(row);
                    for (&atom, &value) in atoms.iter().zip(values) {
                        desk.codes[atom as usize] = value;
                    }
                    coder.improve(desk);
                    let from = codes.atoms.len();
                    codes.push(&desk.codes[..n_atoms]);
                    let used = codes.atoms[from..].iter();
                    products.extend(used.map(|&atom| row_products[atom as usize]));
                }
                (codes, products)
            },
        );
        let (mut codes, mut products) = (Codes::new(), Vec::new());
        for (part, part_products) in parts {
            codes.extend(&part);
            products.extend(part_products);
        }
        self.codes = codes;
        products
    }

    /// Every atom's cap and codes at their joint optimum, one atom after the other.
    fn settle(&mut self, coder: &Coder, products: &mut [f32]) {
        for (atom, users) in self.users().iter().enumerate() {
            let square = coder.gram.row(atom)[atom];
            if square <= 1e-12 || users.is_empty() {
                continue;
            }
            let scale = self.weights.reconstruction * f64::from(square);
            let wish = |&(row, place): &(u32, usize)| {
                let (row, gram) = (row as usize, coder.gram.row(atom));
                let (others, values) = self.codes.row(row);
                let made: f32 = others
                    .iter()
                    .zip(values)
                    .map(|(&o, &r)| gram[o as usize] * r)
                    .sum();
                let slope = products[place] - coder.penalty - made;
                let free = (self.codes.values[place] + slope / square).max(0.0);
                Wish {
                    free,
                    weight: scale * self.row_weights[row],
                }
            };
            let wishes: Vec<Wish> = users.iter().map(wish).collect();
            let cap = best_cap(&mut wishes.clone(), self.weights.size);
            for (&(_, place), wish) in users.iter().zip(&wishes) {
                self.codes.values[place] = wish.free.min(cap);
            }
        }
    }

    /// For each atom the rows that use it and where their codes stand.
    fn users(&self) -> Vec<Vec<(u32, usize)>> {
        let mut users = vec![Vec::new(); self.atoms.n_rows()];
        for row in 0..self.codes.len() {
            let range = self.codes.starts[row] as usize..self.codes.starts[row + 1] as usize;
            for place in range {
                users[self.codes.atoms[place] as usize].push((row as u32, place));
            }
        }
        users
    }

    /// Drops zero codes, sets every peak to the largest code and clears atoms no row uses.
    fn tighten(&mut self) {
        let mut kept = Codes::new();
        let mut row_codes = vec![0.0; self.atoms.n_rows()];
        self.peaks.fill(0.0);
        for row in 0..self.codes.len() {
            let (atoms, values) = self.codes.row(row);
            row_codes.fill(0.0);
            for (&atom, &value) in atoms.iter().zip(values) {
                row_codes[atom as usize] = value;
                self.peaks[atom as usize] = self.peaks[atom as usize].max(value);
            }
            kept.push(&row_codes);
        }
        self.codes = kept;
        for (atom, &peak) in self.peaks.iter().enumerate() {
            if peak <= 0.0 {
                self.atoms.row_mut(atom).fill(0.0);
            }
        }
    }

    /// The sums of the present codes and the objective's terms.
    pub fn sum_up(&mut self, pool: &Pool) {
        let largest = self.largest_weight();
        let relative: Vec<f64> = self
            .row_weights
            .iter()
            .map(|weight| weight / largest)
            .collect();
        let (n_atoms, n_sites) = (self.atoms.n_rows(), self.atoms.width());
        let mut slots: Vec<Slot> = (0..SLOTS).map(|_| Slot::new(n_atoms, n_sites)).collect();
        self.sums = Statistics::new(n_atoms, n_sites);
        let (mut cost, n_rows) = ([0.0; 2], self.sheet.len());
        for from in (0..n_rows).step_by(SLOTS * Slot::ROWS) {
            pool.parts(&mut slots, 1, |at, slot| {
                let first = (from + at * Slot::ROWS).min(n_rows);
                let rows = first..(first + Slot::ROWS).min(n_rows);
                slot[0].take(&self.sheet, rows, &self.codes, &relative, &self.atoms);
            });
            self.sums.add(&slots, pool);
            for slot in &slots {
                cost = [
                    cost[0] + slot.cost[0] * largest,
                    cost[1] + slot.cost[1] * largest,
                ];
            }
        }
        let dictionary_size: f64 = self.peaks.iter().map(|&peak| f64::from(peak)).sum();
        let weights = self.weights;
        let rows = weights.sparsity * cost[0] + weights.reconstruction * cost[1];
        self.terms = Terms {
            dictionary_size,
            sparsity: cost[0],
            reconstruction: cost[1],
            total: weights.size * dictionary_size + rows,
        };
    }
}

#[cfg(test)]
mod tests;
