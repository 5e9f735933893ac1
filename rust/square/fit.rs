//! The whole fit under squared error: learn online, finish exactly, then the next level.

use crate::error::Result;
use crate::hierarchy::{Fit, FittedLevel};
use crate::objective::Terms;
use crate::parallel::Pool;
use crate::params::check_size;
use crate::rows::{Entry, Lists};
use crate::square::encode::Codes;
use crate::square::learner::{Learner, Running, Schedule, State};
use crate::square::level::{Level, Weights};
use crate::square::matrix::Matrix;
use crate::square::params::{SquareParams, ValidSquareParams};
use crate::square::seeding::{parts, random_rows};
use crate::square::sheet::Sheet;
use crate::square::slot::Slot;
use crate::stage::{Record, StopReason, Watcher};

/// Rows between two records of the online learner.
const SEGMENT: usize = 16_384;
/// Past rows weigh by their number to this power.
const EXPONENT: f64 = 3.0;
/// Fraction of the atoms that a batch moves.
const SHARE: f64 = 0.5;
/// Coder tolerance while learning.
const TOLERANCE: f32 = 1e-3;

/// Dropping atoms is tried as long as it helps, and again where an iteration gains less than this
/// many times the tolerance.
const SLOW: f64 = 10.0;

/// What all levels share.
struct Workshop<'a, 'b> {
    pool: Pool,
    params: &'a SquareParams,
    weights: Weights,
    watch: &'a mut Watcher<'b>,
    history: Vec<Record>,
    stop: StopReason,
}

/// One level when it is done: atoms most used first, codes in their numbers.
struct Done {
    atoms: Matrix,
    codes: Codes,
    peaks: Vec<f32>,
    terms: Terms,
}

/// Fits the squared-error objective to rows; `watch` is told of every iteration.
///
/// # Errors
/// More atoms than fit into memory, or threads that cannot be started.
pub(crate) fn fit_square(
    sheet: Sheet,
    params: &ValidSquareParams,
    watch: &mut Watcher,
) -> Result<Fit> {
    check_size(&params.atoms, sheet.n_sites())?;
    let stop = if sheet.is_zero() {
        StopReason::NothingToFit
    } else {
        StopReason::Tolerance
    };
    let weights = Weights {
        size: params.dictionary_size,
        sparsity: params.sparsity,
        reconstruction: params.reconstruction,
    };
    let pool = Pool::new(params.threads)?;
    let history = Vec::new();
    let mut shop = Workshop {
        pool,
        params,
        weights,
        watch,
        history,
        stop,
    };
    let row_weights = vec![1.0 / sheet.len() as f64; sheet.len()];
    let mut levels = vec![shop.first(sheet, row_weights, params.atoms[0])];
    let mut usages = vec![usage(&levels[0], None)];
    for (at, &n_atoms) in params.atoms.iter().enumerate().skip(1) {
        let above = &levels[at - 1];
        let n_rows = above.codes.len() as f64;
        let own = usage(above, None);
        let row_weights = own.iter().map(|usage| usage / n_rows).collect();
        let done = shop.next(&above.atoms, row_weights, (at + 1, n_atoms))?;
        usages.push(usage(&done, Some(&usages[at - 1])));
        levels.push(done);
    }
    Ok(shop.finish(&levels, usages))
}

impl Workshop<'_, '_> {
    fn goes_on(&self) -> bool {
        matches!(self.stop, StopReason::Tolerance | StopReason::MaxIterations)
    }

    /// Notes one iteration; the fit ends when the watcher wants it to.
    fn note(&mut self, stage: String, iteration: usize, terms: Terms, peaks: &[f32]) {
        let record = Record {
            stage,
            iteration,
            terms,
            live: n_live(peaks),
        };
        if !(self.watch)(&record) {
            self.stop = StopReason::Interrupted;
        }
        self.history.push(record);
    }

    /// Level 1: from random rows, by the online learner and then exact steps.
    fn first(&mut self, sheet: Sheet, row_weights: Vec<f64>, n_atoms: usize) -> Done {
        let mut atoms = Matrix::zeros(n_atoms, sheet.n_sites());
        if self.goes_on() {
            atoms = self.learn(&sheet, random_rows(&sheet, n_atoms, self.params.seed));
        }
        self.settle(sheet, row_weights, atoms, 1)
    }

    /// A finer level: from parts of the atoms above, by exact steps.
    fn next(
        &mut self,
        rows: &Matrix,
        row_weights: Vec<f64>,
        place: (usize, usize),
    ) -> Result<Done> {
        let (number, n_atoms) = place;
        let (starts, sites, values) = compressed(rows);
        let sheet = Sheet::new(&starts, &sites, &values, rows.width())?;
        let atoms = if self.goes_on() && self.params.copies {
            random_rows(&sheet, n_atoms, self.params.seed)
        } else if self.goes_on() {
            parts(rows, &row_weights, n_atoms)
        } else {
            Matrix::zeros(n_atoms, rows.width())
        };
        Ok(self.settle(sheet, row_weights, atoms, number))
    }

    /// Some passes of the online learner; the terms of its records are those of the rows since the
    /// last one, each coded with the atoms of its moment.
    fn learn(&mut self, sheet: &Sheet, atoms: Matrix) -> Matrix {
        let schedule = schedule(self.params, atoms.n_rows(), sheet.len());
        let mut left =
            (self.params.passes * sheet.len() as f64 / schedule.batch as f64).ceil() as usize;
        let segment = SEGMENT.min(sheet.len()).div_ceil(schedule.batch);
        let mut learner = Learner::new(State::new(atoms), schedule);
        let (mut last, mut iteration) = (f64::INFINITY, 0);
        while left > 0 && self.goes_on() {
            let batches = left.min(segment);
            let running = learner.learn(sheet, batches, &self.pool);
            let terms = self.running(&running);
            (left, iteration) = (left - batches, iteration + 1);
            self.note("learn 1".into(), iteration, terms, &running.peaks);
            let rows_only = terms.total - self.weights.size * terms.dictionary_size;
            if last - rows_only <= self.params.tolerance * last.min(f64::MAX) && iteration > 2 {
                break;
            }
            last = rows_only;
        }
        learner.into_state().atoms
    }

    fn running(&self, running: &Running) -> Terms {
        let n_rows = running.rows.max(1) as f64;
        let (sparsity, reconstruction) = (running.codes / n_rows, running.error / n_rows);
        let dictionary_size = running.peaks.iter().map(|&peak| f64::from(peak)).sum();
        let Weights {
            size,
            sparsity: l1,
            reconstruction: l2,
        } = self.weights;
        let total = size * dictionary_size + l1 * sparsity + l2 * reconstruction;
        Terms {
            dictionary_size,
            sparsity,
            reconstruction,
            total,
        }
    }

    /// Exact steps until nothing helps.
    fn settle(
        &mut self,
        sheet: Sheet,
        row_weights: Vec<f64>,
        atoms: Matrix,
        number: usize,
    ) -> Done {
        let weights = self.weights;
        let start = || Level::new(sheet, row_weights, atoms, weights, &self.pool);
        let mut level = self.pool.inside(start);
        let mut reached = StopReason::MaxIterations;
        let mut dropping = true;
        for iteration in 1..=self.params.max_iterations {
            if !self.goes_on() {
                break;
            }
            let last = level.terms.total;
            self.pool.inside(|| {
                level.improve(&self.pool);
                let slow = last - level.terms.total <= SLOW * self.params.tolerance * last;
                if weights.size > 0.0 && (dropping || slow) {
                    dropping = level.drop_weak(&self.pool);
                }
            });
            self.note(
                format!("level {number}"),
                iteration,
                level.terms,
                &level.peaks,
            );
            if last - level.terms.total <= self.params.tolerance * last {
                reached = StopReason::Tolerance;
                break;
            }
        }
        if self.stop == StopReason::Tolerance {
            self.stop = reached;
        }
        ordered(&level)
    }

    /// The last record and everything as lists.
    fn finish(mut self, levels: &[Done], usages: Vec<Vec<f64>>) -> Fit {
        let terms = levels
            .iter()
            .map(|level| level.terms)
            .fold(Terms::default(), Terms::plus);
        self.history.push(Record {
            stage: "final".into(),
            iteration: 0,
            terms,
            live: levels.iter().map(|level| n_live(&level.peaks)).sum(),
        });
        let pairs = levels.iter().zip(usages);
        Fit {
            levels: pairs.map(|(level, usage)| fitted(level, usage)).collect(),
            history: self.history,
            stop: self.stop,
        }
    }
}

/// Atoms that some row uses.
fn n_live(peaks: &[f32]) -> usize {
    peaks.iter().filter(|peak| **peak > 0.0).count()
}

/// Three quarters of as many rows as atoms a batch, in whole row blocks; half a pass of memory.
fn schedule(params: &SquareParams, n_atoms: usize, n_rows: usize) -> Schedule {
    let blocks = (0.75 * n_atoms as f64 / Slot::ROWS as f64)
        .round()
        .clamp(1.0, 8.0) as usize;
    let batch = if params.batch > 0 {
        params.batch
    } else {
        blocks * Slot::ROWS
    };
    let batch = batch.min(n_rows);
    Schedule {
        batch,
        window: (n_rows / 2).max(4 * batch),
        exponent: EXPONENT,
        share: SHARE,
        penalty: (params.sparsity / params.reconstruction) as f32,
        tolerance: TOLERANCE,
        seed: params.seed,
    }
}

/// Rows of a dense matrix as compressed arrays.
fn compressed(rows: &Matrix) -> (Vec<i64>, Vec<u32>, Vec<f32>) {
    let (mut starts, mut sites, mut values) = (vec![0], Vec::new(), Vec::new());
    for row in 0..rows.n_rows() {
        for (site, &value) in rows
            .row(row)
            .iter()
            .enumerate()
            .filter(|(_, value)| **value > 0.0)
        {
            sites.push(site as u32);
            values.push(value);
        }
        starts.push(sites.len() as i64);
    }
    (starts, sites, values)
}

/// Total code of each atom over the data rows: rows count as often as they are used.
fn usage(level: &Done, above: Option<&Vec<f64>>) -> Vec<f64> {
    let mut usage = vec![0.0; level.atoms.n_rows()];
    for row in 0..level.codes.len() {
        let times = above.map_or(1.0, |above| above[row]);
        let (atoms, values) = level.codes.row(row);
        for (&atom, &value) in atoms.iter().zip(values) {
            usage[atom as usize] += times * f64::from(value);
        }
    }
    usage
}

/// The level with its atoms most used first; unused ones last, all else in the old order.
fn ordered(level: &Level) -> Done {
    let mut usage = vec![0.0; level.atoms.n_rows()];
    for (&atom, &value) in level.codes.atoms.iter().zip(&level.codes.values) {
        usage[atom as usize] += f64::from(value);
    }
    let mut order: Vec<usize> = (0..usage.len()).collect();
    order.sort_by(|&a, &b| usage[b].total_cmp(&usage[a]).then(a.cmp(&b)));
    let mut atoms = Matrix::zeros(usage.len(), level.atoms.width());
    let mut place = vec![0; usage.len()];
    for (new, &old) in order.iter().enumerate() {
        atoms.row_mut(new).copy_from_slice(level.atoms.row(old));
        place[old] = new;
    }
    let mut codes = Codes::new();
    let mut row_codes = vec![0.0; usage.len()];
    for row in 0..level.codes.len() {
        let (used, values) = level.codes.row(row);
        row_codes.fill(0.0);
        for (&atom, &value) in used.iter().zip(values) {
            row_codes[place[atom as usize]] = value;
        }
        codes.push(&row_codes);
    }
    let peaks = order.iter().map(|&old| level.peaks[old]).collect();
    Done {
        atoms,
        codes,
        peaks,
        terms: level.terms,
    }
}

fn fitted(level: &Done, usage: Vec<f64>) -> FittedLevel {
    let list = |indices: &[u32], values: &[f32]| -> Vec<Entry> {
        let pairs = indices.iter().zip(values);
        pairs
            .map(|(&index, &value)| Entry { index, value })
            .collect()
    };
    let codes: Lists = (0..level.codes.len())
        .map(|row| list(level.codes.row(row).0, level.codes.row(row).1))
        .collect();
    let (starts, sites, values) = compressed(&level.atoms);
    let atoms = starts.windows(2).map(|bounds| {
        let range = bounds[0] as usize..bounds[1] as usize;
        list(&sites[range.clone()], &values[range])
    });
    FittedLevel {
        atoms: atoms.collect(),
        codes,
        peak: level.peaks.iter().map(|&peak| f64::from(peak)).collect(),
        usage,
    }
}

#[cfg(test)]
mod tests;
