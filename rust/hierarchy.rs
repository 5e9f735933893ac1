//! The whole fit: level by level, then all levels together.

use crate::encoding::Codebook;
use crate::error::Result;
use crate::joint::{joint, n_live, next_target, refresh, total};
use crate::level::{Level, Target};
use crate::params::{ValidParams, check_size};
use crate::pieces::{Pieces, pieces};
use crate::rows::{Entry, Rows};
use crate::stage::{Record, StopReason, Watcher, Workshop};
use crate::start::start_from;

/// Result of a fit.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Levels, coarse to fine; live atoms first, most used first.
    pub levels: Vec<FittedLevel>,
    /// Every iteration, then one record named `final` with the usage weights of the result.
    pub history: Vec<Record>,
    /// Why the fit ended.
    pub stop: StopReason,
}

/// One level of the result.
#[derive(Debug, Clone)]
pub struct FittedLevel {
    /// Atoms as sparse lists over sites, in [0, 1].
    pub atoms: Vec<Vec<Entry>>,
    /// For each row of the level above (level 1: each data row) its codes.
    pub codes: Vec<Vec<Entry>>,
    /// Largest code of each atom.
    pub peak: Vec<f64>,
    /// Total use of each atom over the data rows, through the levels above.
    pub usage: Vec<f64>,
}

/// Fits the objective of [`crate::Params`] to rows; `watch` is told of every iteration.
///
/// # Errors
/// More atoms than fit into memory, or threads that cannot be started.
pub fn fit(rows: Rows, params: &ValidParams, watch: &mut Watcher) -> Result<Fit> {
    fit_below(rows, params, None, watch)
}

/// The same with the atoms of level 1 given: rows are coded on them, finer levels are fitted to
/// them, and then all levels are fitted together.
///
/// # Errors
/// Another number of atoms or sites than the parameters and rows have; the threads cannot be
/// started.
pub fn fit_below(
    rows: Rows,
    params: &ValidParams,
    start: Option<Codebook>,
    watch: &mut Watcher,
) -> Result<Fit> {
    if let Some(start) = &start {
        start.fits(params.atoms[0], rows.n_sites())?;
    }
    let mut start = start;
    check_size(&params.atoms, rows.n_sites())?;
    let mut shop = Workshop::new(params, watch)?;
    let weight = vec![1.0 / rows.len() as f64; rows.len()];
    let nothing = rows.is_empty();
    let mut levels: Vec<Level> = Vec::new();
    let mut stop = if nothing {
        StopReason::NothingToFit
    } else {
        StopReason::Tolerance
    };
    let mut target = Target::new(rows, weight);
    for (at, &n_atoms) in params.atoms.iter().enumerate() {
        let mut level = Level::empty(target, n_atoms);
        if let Some(above) = levels.last().filter(|_| !params.copies) {
            start_from_pieces(&mut level, &pieces(above, &shop.pool, n_atoms));
        }
        if matches!(stop, StopReason::Tolerance | StopReason::MaxIterations) {
            let reached = if let Some(book) = start.take() {
                start_from(&mut level, &shop.pool, shop.lambda(), book.into_parts());
                StopReason::Tolerance
            } else if at == 0 {
                shop.fit_first(&mut level)
            } else {
                shop.fit_finer(&mut level, at + 1)
            };
            stop = worse(stop, reached);
        }
        target = next_target(&level);
        levels.push(level);
    }
    if params.atoms.len() > 1 && matches!(stop, StopReason::Tolerance | StopReason::MaxIterations) {
        stop = worse(stop, joint(&mut shop, &mut levels));
    }
    Ok(finish(shop, levels, stop))
}

/// Gives a level the pieces of the atoms above and codes every atom by its own.
fn start_from_pieces(level: &mut Level, pieces: &Pieces) {
    for (atom, members) in pieces.atoms.iter().enumerate() {
        level.dictionary.set(atom, members.clone());
    }
    let code = |&index: &u32| Entry { index, value: 1.0 };
    level.codes = pieces
        .parts
        .iter()
        .map(|parts| parts.iter().map(code).collect())
        .collect();
    level.finer = true;
    level.rescale();
}

/// The more serious of two reasons.
pub(crate) fn worse(a: StopReason, b: StopReason) -> StopReason {
    let rank = |reason| match reason {
        StopReason::Tolerance => 0,
        StopReason::MaxIterations => 1,
        StopReason::Interrupted | StopReason::NothingToFit => 2,
    };
    if rank(b) > rank(a) { b } else { a }
}

/// Sorts atoms, refreshes the weights and writes the last record.
fn finish(mut shop: Workshop, mut levels: Vec<Level>, stop: StopReason) -> Fit {
    refresh(&mut levels);
    for at in 0..levels.len() {
        let order = by_usage(&levels[at]);
        reorder(&mut levels[at], &order);
        if at + 1 < levels.len() {
            let codes = std::mem::take(&mut levels[at + 1].codes);
            levels[at + 1].codes = order.iter().map(|&old| codes[old].clone()).collect();
            levels[at + 1].target = next_target(&levels[at]);
        }
    }
    let last = total(&shop, &levels);
    shop.history.push(Record {
        stage: "final".to_owned(),
        iteration: 0,
        terms: last,
        live: n_live(&levels),
    });
    let mut usage: Option<Vec<f64>> = None;
    let levels = levels.into_iter().map(|level| {
        let propagated = propagate(&level, usage.as_deref());
        usage = Some(propagated.clone());
        fitted(level, propagated)
    });
    Fit {
        levels: levels.collect(),
        history: shop.history,
        stop,
    }
}

/// Atoms, most used first; unused ones last, all else in the old order.
fn by_usage(level: &Level) -> Vec<usize> {
    let usage = level.usage();
    let mut order: Vec<usize> = (0..usage.len()).collect();
    order.sort_by(|&a, &b| usage[b].total_cmp(&usage[a]));
    order
}

/// Puts atoms into a new order (`order[new]` is the old place).
fn reorder(level: &mut Level, order: &[usize]) {
    let mut place = vec![0_u32; order.len()];
    for (new, &old) in order.iter().enumerate() {
        place[old] = new as u32;
    }
    let atoms = order
        .iter()
        .map(|&old| level.dictionary.atom(old).to_vec())
        .collect();
    level.dictionary = crate::dictionary::Dictionary::from_atoms(atoms, level.dictionary.n_sites());
    for row in &mut level.codes {
        for code in row.iter_mut() {
            code.index = place[code.index as usize];
        }
        row.sort_unstable_by_key(|code| code.index);
    }
    level.tighten();
}

/// Use of each atom over the data rows: codes times the use of the rows.
fn propagate(level: &Level, above: Option<&[f64]>) -> Vec<f64> {
    let mut usage = vec![0.0; level.n_atoms()];
    for (row, codes) in level.codes.iter().enumerate() {
        let factor = above.map_or(1.0, |above| above[row]);
        for code in codes {
            usage[code.index as usize] += factor * f64::from(code.value);
        }
    }
    usage
}

fn fitted(level: Level, usage: Vec<f64>) -> FittedLevel {
    FittedLevel {
        peak: level.caps.iter().map(|&cap| f64::from(cap)).collect(),
        atoms: level.dictionary.atoms().clone(),
        codes: level.codes,
        usage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;
    use crate::rows::Lists;
    use proptest::prelude::*;

    /// Rows of a few fixed groups with strays.
    fn rows(picks: &[(u8, u8, u8)]) -> Rows {
        let lists: Lists = picks
            .iter()
            .map(|&(group, scale, stray)| {
                let mut row = [0.0_f32; 12];
                for site in 0..3 {
                    row[usize::from(group % 4) * 3 + site] = f32::from(scale) / 4.0;
                }
                row[usize::from(stray % 12)] += 0.25;
                let filled = row
                    .iter()
                    .enumerate()
                    .filter(|(_, v)| **v > 0.0 && scale > 0);
                filled
                    .map(|(i, &value)| Entry {
                        index: i as u32,
                        value,
                    })
                    .collect()
            })
            .collect();
        Rows::from_lists(&lists, 12)
    }

    fn params(threads: usize, sparsity: f64) -> ValidParams {
        let (max_iterations, tolerance, seed) = (20, 1e-4, 3);
        let (atoms, reconstruction) = (vec![6, 8], 30.0);
        let all = Params {
            atoms,
            copies: false,
            dictionary_size: 1.0,
            sparsity,
            reconstruction,
            max_iterations,
            tolerance,
            seed,
            threads,
        };
        all.check().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn descends_within_its_box_for_any_number_of_threads(
            picks in prop::collection::vec((0_u8..4, 0_u8..5, 0_u8..40), 2..60),
            sparsity in prop::sample::select(vec![0.0, 0.3, 30.0]),
        ) {
            let fitted = |threads| fit(rows(&picks), &params(threads, sparsity), &mut |_| true);
            let one = fitted(1).unwrap();
            for pair in one.history.windows(2).filter(|pair| pair[0].stage == pair[1].stage) {
                prop_assert!(pair[1].terms.total <= pair[0].terms.total * (1.0 + 1e-6), "{pair:?}");
            }
            for level in &one.levels {
                let inside = |entry: &Entry| entry.value > 0.0 && entry.value <= 1.0;
                prop_assert!(level.atoms.iter().flatten().all(inside));
                prop_assert!(level.codes.iter().flatten().all(|code| code.value > 0.0));
            }
            for (row, codes) in one.levels[0].codes.iter().enumerate() {
                prop_assert!(!rows(&picks).row(row).is_empty() || codes.is_empty());
            }
            let three = fitted(3).unwrap();
            prop_assert_eq!(&one.history, &three.history);
            for (a, b) in one.levels.iter().zip(&three.levels) {
                prop_assert_eq!((&a.atoms, &a.codes), (&b.atoms, &b.codes));
            }
        }
    }

    #[test]
    fn stops_when_told() {
        let picks = vec![(0, 4, 1), (1, 4, 5), (0, 3, 7), (2, 2, 9)];
        let stopped = fit(rows(&picks), &params(1, 0.1), &mut |_| false).unwrap();
        assert_eq!(stopped.stop, StopReason::Interrupted);
        assert_eq!((stopped.levels.len(), stopped.history.len()), (2, 2));
    }

    #[test]
    fn nothing_to_fit() {
        let found = fit(rows(&[(0, 0, 0); 5]), &params(1, 0.1), &mut |_| true).unwrap();
        assert_eq!(found.stop, StopReason::NothingToFit);
        assert!(
            found
                .levels
                .iter()
                .all(|level| level.atoms.iter().all(Vec::is_empty))
        );
    }
}
