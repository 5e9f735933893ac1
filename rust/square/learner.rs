//! Online dictionary learning: batches of rows, coded and added to sums that the atoms follow.

use crate::error::{Error, Result};
use crate::parallel::Pool;
use crate::square::coder::Coder;
use crate::square::correlate::gram;
use crate::square::matrix::{LINE, Matrix};
use crate::square::order::Order;
use crate::square::panels::Panels;
use crate::square::replace::{exchanges, newcomers, worths};
use crate::square::sheet::Sheet;
use crate::square::slot::{Slot, Tools};
use crate::square::statistics::Statistics;
use crate::square::update::{BLOCK, Steps, most_promising, refresh_gram};

/// More rows than anyone sees.
const MOST_ROWS: u64 = 1 << 52;
/// Rows between exchanges, for every atom.
const SPACING: usize = 4;
/// Rows for every atom before one that was put in may be exchanged again.
const CHILDHOOD: usize = 16;
/// One in this many atoms may be exchanged at once.
const AT_ONCE: usize = 32;

/// How batches are drawn and the past forgotten.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    /// Rows of a batch.
    pub batch: usize,
    /// Rows after which the past is forgotten at a constant rate.
    pub window: usize,
    /// After i rows, those of the first j weigh (j/i) to this power.
    pub exponent: f64,
    /// Fraction of the atoms that a batch moves: those that promise most.
    pub share: f64,
    /// lambda 1 over lambda 2.
    pub penalty: f32,
    /// Tolerance of the coder.
    pub tolerance: f32,
    /// Seed of the order of rows and of replacements.
    pub seed: u64,
}

/// All that is needed to go on learning later.
#[derive(Debug, Clone)]
pub(crate) struct State {
    /// Atoms, (`n_atoms`, `n_sites`), of norm at most 1.
    pub atoms: Matrix,
    pub sums: Statistics,
    pub order: Order,
    /// Rows seen.
    pub seen: u64,
    /// For each atom the rows seen when it was put in its place.
    pub born: Vec<u64>,
    /// Rows seen when atoms were last exchanged.
    pub exchanged: u64,
}

impl State {
    /// Nothing learned yet: atoms to start from, which should have norm 1.
    pub fn new(atoms: Matrix) -> Self {
        Self {
            sums: Statistics::new(atoms.n_rows(), atoms.width()),
            order: Order::default(),
            seen: 0,
            born: vec![0; atoms.n_rows()],
            exchanged: 0,
            atoms,
        }
    }

    /// The same, if it can be the state of a learner: a file may hold anything.
    ///
    /// # Errors
    /// [`Error::Value`] names the array.
    pub fn check(self) -> Result<Self> {
        let late = |&rows: &u64| rows > self.seen;
        let scales = [self.sums.mass, self.sums.weight];
        let sums = |value: &f32| !value.is_finite();
        let weights = |value: &f32| !value.is_finite() || *value < 0.0;
        let counts = [self.exchanged, self.seen, self.order.pass];
        let found = [
            ("second", self.sums.second.all().iter().position(sums)),
            ("pull", self.sums.pull.all().iter().position(sums)),
            ("first", self.sums.first.iter().position(sums)),
            ("scales", scales.iter().position(weights)),
            ("counts", counts.iter().position(|&count| count > MOST_ROWS)),
            ("counts", Some(1).filter(|_| late(&self.exchanged))),
            ("born", self.born.iter().position(late)),
        ];
        match found.iter().find_map(|(what, at)| at.map(|at| (*what, at))) {
            None => Ok(self),
            Some((what, position)) => Err(Error::Value {
                what,
                got: "what cannot be".into(),
                position,
                allowed: "as learn_square returned it",
            }),
        }
    }
}

/// A dictionary being learned.
#[derive(Debug)]
pub(crate) struct Learner {
    state: State,
    schedule: Schedule,
    panels: Panels,
    coder: Coder,
    slots: Vec<Slot>,
    steps: Steps,
}

/// What some batches cost, each with the dictionary of its moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Running {
    pub rows: usize,
    /// Sum of codes over the rows.
    pub codes: f64,
    /// Half the squared error over the rows.
    pub error: f64,
    /// Largest code of each atom.
    pub peaks: Vec<f32>,
}

impl Learner {
    /// Goes on from a state. What is not in it follows from it, to the last bit.
    pub fn new(state: State, schedule: Schedule) -> Self {
        let (n_atoms, n_sites) = (state.atoms.n_rows(), state.atoms.width());
        let panels = Panels::new(&state.atoms);
        let gram = gram(&state.atoms, &panels);
        let n_slots = schedule.batch.div_ceil(Slot::ROWS);
        Self {
            coder: Coder::new(gram, schedule.penalty, schedule.tolerance),
            slots: (0..n_slots).map(|_| Slot::new(n_atoms, n_sites)).collect(),
            steps: Steps::new(n_atoms, n_sites),
            panels,
            state,
            schedule,
        }
    }

    /// What has been learned.
    pub fn into_state(self) -> State {
        self.state
    }

    /// Learns from the next batches of some rows.
    pub fn learn(&mut self, sheet: &Sheet, batches: usize, pool: &Pool) -> Running {
        pool.inside(|| {
            let mut running = Running {
                peaks: vec![0.0; self.state.atoms.n_rows()],
                ..Running::default()
            };
            for _ in 0..batches {
                self.batch(sheet, pool, &mut running);
            }
            running
        })
    }

    fn batch(&mut self, sheet: &Sheet, pool: &Pool, running: &mut Running) {
        let n_rows = self.code(sheet, pool);
        self.forget(n_rows);
        self.state.sums.add(&self.slots, pool);
        self.state.seen += n_rows as u64;
        for slot in &self.slots {
            running.codes += slot.cost[0];
            running.error += slot.cost[1];
            for code in (0..slot.n_rows()).flat_map(|row| slot.codes(row)) {
                let peak = &mut running.peaks[code.index as usize];
                *peak = peak.max(code.value);
            }
        }
        running.rows += n_rows;
        self.update(pool);
        if self.state.seen - self.state.exchanged >= (SPACING * self.state.atoms.n_rows()) as u64 {
            self.state.exchanged = self.state.seen;
            self.exchange(pool);
        }
    }

    /// Gives the places of atoms that others can stand in for to what is still unexplained.
    fn exchange(&mut self, pool: &Pool) {
        let n_atoms = self.state.atoms.n_rows();
        let count = n_atoms.div_ceil(AT_ONCE);
        let news = newcomers(&self.slots, count, self.schedule.penalty);
        let promises: Vec<f64> = news.iter().map(|new| new.0).collect();
        let worths = worths(&self.coder, &self.state.sums, pool);
        let (seen, born) = (self.state.seen, &self.state.born);
        let grown = |atom: usize| seen - born[atom] >= (CHILDHOOD * n_atoms) as u64;
        let which = exchanges(&worths, grown, &promises);
        for (&atom, new) in which.iter().zip(&news) {
            self.state.sums.drop_atom(atom, self.state.atoms.row(atom));
            self.state.atoms.row_mut(atom)[..new.1.len()].copy_from_slice(&new.1);
            self.state.born[atom] = seen;
        }
        let mut which: Vec<u32> = which.iter().map(|&atom| atom as u32).collect();
        which.sort_unstable();
        self.follow(&which, pool);
    }

    /// Codes the next batch; returns its number of rows.
    fn code(&mut self, sheet: &Sheet, pool: &Pool) -> usize {
        let rows = self
            .state
            .order
            .draw(sheet.len(), self.schedule.batch, self.schedule.seed);
        let tools = Tools {
            atoms: &self.state.atoms,
            panels: &self.panels,
            coder: &self.coder,
        };
        pool.parts(&mut self.slots, 1, |at, slot| {
            let from = (at * Slot::ROWS).min(rows.len());
            let to = (from + Slot::ROWS).min(rows.len());
            slot[0].fill(sheet, &rows[from..to], tools);
        });
        rows.len()
    }

    /// Lets the past weigh less: `(1 - batch/seen)^exponent` of what it did.
    fn forget(&mut self, n_rows: usize) {
        let seen = ((self.state.seen + n_rows as u64) as f64).min(self.schedule.window as f64);
        let keep = (1.0 - n_rows as f64 / seen.max(n_rows as f64)).powf(self.schedule.exponent);
        self.state.sums.forget(keep);
    }

    /// Moves the most promising atoms and all that follows from them.
    fn update(&mut self, pool: &Pool) {
        let n_atoms = self.state.atoms.n_rows();
        let moved = ((n_atoms as f64 * self.schedule.share).ceil() as usize).clamp(1, n_atoms);
        let which = most_promising(&self.state.atoms, &self.state.sums, moved);
        for block in which.chunks(BLOCK) {
            self.steps
                .block(block, &mut self.state.atoms, &mut self.state.sums, pool);
        }
        self.follow(&which, pool);
    }

    /// Brings panels and Gram matrix up to date with some atoms.
    fn follow(&mut self, which: &[u32], pool: &Pool) {
        for line in 0..self.state.atoms.n_rows().div_ceil(LINE) {
            let inside = |atom: &u32| *atom as usize / LINE == line;
            if which.iter().any(inside) {
                self.panels.refresh(&self.state.atoms, line);
            }
        }
        refresh_gram(
            which,
            &self.state.atoms,
            &self.panels,
            &mut self.coder.gram,
            pool,
        );
        self.coder.refresh();
    }
}

#[cfg(test)]
pub(crate) mod tests;
