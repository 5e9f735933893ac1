//! All levels moved together: each by block steps, pulled at by the one below it.

use crate::hierarchy::worse;
use crate::level::{Level, Target};
use crate::objective::{Terms, terms};
use crate::rows::{Entry, Lists, Rows, transpose};
use crate::stage::{StopReason, Workshop};
use crate::update::Pull;

/// Rounds of joint fine-tuning; the usage weights are refreshed before each.
const JOINT_ROUNDS: usize = 2;

/// Atoms of a level as rows for the next, weighted by use over the number of code columns.
pub(crate) fn next_target(level: &Level) -> Target {
    let rows = Rows::from_lists(level.dictionary.atoms(), level.dictionary.n_sites());
    let n_columns = level.n_rows() as f64;
    Target::new(
        rows,
        level
            .usage()
            .iter()
            .map(|usage| usage / n_columns)
            .collect(),
    )
}

/// Fine-tunes all levels on the sum of their objectives.
pub(crate) fn joint(shop: &mut Workshop, levels: &mut [Level]) -> StopReason {
    let mut stop = StopReason::Tolerance;
    for round in 1..=JOINT_ROUNDS {
        refresh(levels);
        let reached = joint_round(shop, levels, &format!("joint {round}"));
        stop = worse(stop, reached);
        if reached == StopReason::Interrupted {
            break;
        }
    }
    stop
}

fn joint_round(shop: &mut Workshop, levels: &mut [Level], stage: &str) -> StopReason {
    let mut last = total(shop, levels).total;
    for iteration in 1..=shop.params.max_iterations {
        for at in 0..levels.len() {
            let pull = (at + 1 < levels.len()).then(|| pull(&levels[at + 1]));
            shop.improve_pulled(&mut levels[at], pull.as_ref());
            if at + 1 < levels.len() {
                let weight = std::mem::take(&mut levels[at + 1].target.weight);
                levels[at + 1].target = Target {
                    weight,
                    ..next_target(&levels[at])
                };
            }
        }
        let now = total(shop, levels);
        if !shop.note(stage, iteration, now, n_live(levels)) {
            return StopReason::Interrupted;
        }
        if last - now.total <= shop.params.tolerance * last {
            return StopReason::Tolerance;
        }
        last = now.total;
    }
    StopReason::MaxIterations
}

/// Takes the usage weights of the present codes; clears atoms that have lost all use.
pub(crate) fn refresh(levels: &mut [Level]) {
    for at in 0..levels.len() {
        levels[at].tighten();
        levels[at].clear_dead();
        if at + 1 < levels.len() {
            levels[at + 1].target = next_target(&levels[at]);
        }
    }
}

/// What the finer level makes of the coarser one's atoms, site by site.
fn pull(finer: &Level) -> Pull {
    let n_sites = finer.dictionary.n_sites();
    let mut row = vec![0.0_f32; n_sites];
    let rebuilt: Lists = finer
        .codes
        .iter()
        .map(|codes| {
            row.fill(0.0);
            for code in codes {
                for member in finer.dictionary.atom(code.index as usize) {
                    row[member.index as usize] += code.value * member.value;
                }
            }
            let filled = row.iter().enumerate().filter(|(_, value)| **value > 0.0);
            filled
                .map(|(site, &value)| Entry {
                    index: site as u32,
                    value,
                })
                .collect()
        })
        .collect();
    Pull {
        weight: finer.target.weight.clone(),
        sites: transpose(&rebuilt, n_sites),
    }
}

/// Atoms in use, over all levels.
pub(crate) fn n_live(levels: &[Level]) -> usize {
    levels.iter().map(Level::n_live).sum()
}

/// The terms of all levels together.
pub(crate) fn total(shop: &Workshop, levels: &[Level]) -> Terms {
    let each = levels
        .iter()
        .map(|level| terms(level, &shop.pool, shop.lambda()));
    each.fold(Terms::default(), Terms::plus)
}
