//! One stage of the fit: iterations until nothing helps, with a record of each.

use crate::caps::settle;
use crate::coding::{Coder, Desk};
use crate::error::Result;
use crate::level::Level;
use crate::moves::Mover;
use crate::objective::{Terms, terms};
use crate::parallel::Pool;
use crate::params::{Lambda, ValidParams};
use crate::rng::Rng;
use crate::seeding::grow;
use crate::start::{sample, sample_sizes, start_from, start_from_rows};
use crate::update::{Pull, update};

/// One in this many atoms is exchanged at a time.
const EXCHANGED: usize = 16;
/// Moves begin when block steps gain less than this many tolerances, and a sample's fit ends there:
/// what it would gain later hardly holds for all rows.
const COARSE: f64 = 10.0;

/// What one iteration reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Name of the stage: `level 1`, `level 2`, `joint 1`.
    pub stage: String,
    /// Iteration within the stage, from 1.
    pub iteration: usize,
    /// The objective's terms after it.
    pub terms: Terms,
    /// Atoms in use, over the levels of the stage.
    pub live: usize,
}

/// Why a stage or the whole fit ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The last iteration lowered the objective by less than the tolerance.
    Tolerance,
    /// The iteration limit came first.
    MaxIterations,
    /// The watcher asked to stop.
    Interrupted,
    /// All rows are zero.
    NothingToFit,
}

impl StopReason {
    /// The words a user reads.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Tolerance => "tolerance",
            Self::MaxIterations => "max iterations",
            Self::Interrupted => "interrupted",
            Self::NothingToFit => "nothing to fit",
        }
    }
}

/// Told of every iteration; says whether to go on.
pub type Watcher<'a> = dyn FnMut(&Record) -> bool + 'a;

/// What all stages of a fit share.
pub(crate) struct Workshop<'a, 'b> {
    pub pool: Pool,
    pub params: &'a ValidParams,
    pub watch: &'a mut Watcher<'b>,
    pub history: Vec<Record>,
}

impl<'a, 'b> Workshop<'a, 'b> {
    /// Starts the threads.
    pub fn new(params: &'a ValidParams, watch: &'a mut Watcher<'b>) -> Result<Self> {
        Ok(Self {
            pool: Pool::new(params.threads)?,
            params,
            watch,
            history: Vec::new(),
        })
    }

    /// The weights of the objective.
    pub fn lambda(&self) -> Lambda {
        Lambda {
            dictionary_size: self.params.dictionary_size,
            sparsity: self.params.sparsity,
            reconstruction: self.params.reconstruction,
        }
    }

    /// Notes one iteration; false if the watcher wants to stop.
    pub fn note(&mut self, stage: &str, iteration: usize, terms: Terms, live: usize) -> bool {
        let record = Record {
            stage: stage.to_owned(),
            iteration,
            terms,
            live,
        };
        let go_on = (self.watch)(&record);
        self.history.push(record);
        go_on
    }

    /// Fits level 1: on samples of growing size, then on all rows.
    pub fn fit_first(&mut self, level: &mut Level) -> StopReason {
        let mut known = None;
        for n in sample_sizes(level.n_rows(), level.n_atoms()) {
            let mut part = sample(level, n, &mut self.rng(1, n));
            let stop = self.fit_from(&mut part, known, &format!("level 1 on {n} rows"));
            if stop == StopReason::Interrupted {
                start_from(
                    level,
                    &self.pool,
                    self.lambda(),
                    (part.dictionary, part.caps),
                );
                return stop;
            }
            known = Some(part);
        }
        self.fit_from(level, known, "level 1")
    }

    /// Fits a level from the atoms of another, or from rows of its own.
    fn fit_from(&mut self, level: &mut Level, known: Option<Level>, stage: &str) -> StopReason {
        let lambda = self.lambda();
        if let Some(known) = known {
            start_from(level, &self.pool, lambda, (known.dictionary, known.caps));
            return self.descend(level, 1, (stage, 1.0), false);
        }
        let mut rng = self.rng(1, 0);
        start_from_rows(level, &self.pool, lambda, &mut rng);
        let coarse = if stage == "level 1" { 1.0 } else { COARSE };
        self.descend(level, 1, (stage, coarse), true)
    }

    /// Fits a finer level to its target, from the atoms it has or, without any, from copies.
    pub fn fit_finer(&mut self, level: &mut Level, number: usize) -> StopReason {
        if !level.finer {
            let mut rng = self.rng(number, 0);
            start_from_rows(level, &self.pool, self.lambda(), &mut rng);
        }
        self.descend(level, number, (&format!("level {number}"), 1.0), true)
    }

    fn rng(&self, level: usize, round: usize) -> Rng {
        Rng::new(self.params.seed, level, round)
    }

    /// Growth, block steps and, if asked for, moves until the objective falls by less than the
    /// tolerance times `coarse`.
    fn descend(
        &mut self,
        level: &mut Level,
        number: usize,
        (stage, coarse): (&str, f64),
        moves: bool,
    ) -> StopReason {
        let tolerance = self.params.tolerance;
        let mut last = terms(level, &self.pool, self.lambda()).total;
        for iteration in 1..=self.params.max_iterations {
            let mut rng = self.rng(number, iteration);
            let least = 1e-7 * last;
            grow(level, &self.pool, self.lambda(), &mut rng, least);
            self.improve(level);
            let mut now = terms(level, &self.pool, self.lambda());
            if moves && last - now.total < COARSE * tolerance * last {
                let weakest = self.escape(level, least, &mut rng);
                self.improve(level);
                self.exchange(level, &weakest, &mut rng);
                now = terms(level, &self.pool, self.lambda());
            }
            if !self.note(stage, iteration, now, level.n_live()) {
                return StopReason::Interrupted;
            }
            if last - now.total <= coarse * tolerance * last {
                return StopReason::Tolerance;
            }
            last = now.total;
        }
        StopReason::MaxIterations
    }

    /// One round of exact block steps: codes under their caps, caps, dictionary, scale.
    fn improve(&self, level: &mut Level) {
        recode(level, &self.pool, self.lambda());
        settle(level, &self.pool, self.lambda());
        level.clear_dead();
        update(level, &self.pool, None);
        level.rescale();
    }

    /// Moves that coordinate steps cannot make. Returns the least valuable atoms.
    fn escape(&self, level: &mut Level, least: f64, rng: &mut Rng) -> Vec<usize> {
        let may_join = !level.finer;
        let mut mover = Mover::new(level, &self.pool, self.lambda(), least);
        mover.repair(rng);
        if may_join {
            mover.join();
        }
        let mut stay = mover.remove();
        level.tighten();
        level.clear_dead();
        stay.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        stay.into_iter().map(|(_, atom)| atom).collect()
    }

    /// Exchanges the least valuable atoms for new ones, if that lowers the objective.
    ///
    /// Only when nearly all places are taken: with free ones, growing has been tried.
    fn exchange(&self, level: &mut Level, weakest: &[usize], rng: &mut Rng) {
        let n = (level.n_atoms() / EXCHANGED).max(1);
        let free = level.caps.iter().filter(|cap| **cap <= 0.0).count();
        if free > n || weakest.len() < n {
            return;
        }
        let before = terms(level, &self.pool, self.lambda()).total;
        let old = (
            level.dictionary.clone(),
            level.codes.clone(),
            level.caps.clone(),
        );
        let mut mover = Mover::new(level, &self.pool, self.lambda(), 0.0);
        for &atom in &weakest[..n] {
            mover.discard(atom);
        }
        level.tighten();
        level.clear_dead();
        grow(level, &self.pool, self.lambda(), rng, 1e-7 * before);
        self.improve(level);
        if terms(level, &self.pool, self.lambda()).total >= before {
            (level.dictionary, level.codes, level.caps) = old;
        }
    }

    /// One round of block steps on a level that a finer one pulls at; atoms keep their scale.
    pub fn improve_pulled(&self, level: &mut Level, pull: Option<&Pull>) {
        recode(level, &self.pool, self.lambda());
        settle(level, &self.pool, self.lambda());
        update(level, &self.pool, pull);
    }
}

/// Better codes for every row under the present caps.
fn recode(level: &mut Level, pool: &Pool, lambda: Lambda) {
    level.tighten();
    let ratio = lambda.ratio();
    let coder = Coder {
        dictionary: &level.dictionary,
        caps: &level.caps,
        ratio,
    };
    let desk = || Desk::new(level.dictionary.n_sites(), level.n_atoms());
    level.codes = pool.map(level.n_rows(), desk, |desk, row| {
        coder.improve(desk, level.target.rows.row(row), &level.codes[row])
    });
    level.tighten();
}
