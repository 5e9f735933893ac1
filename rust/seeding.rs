//! New atoms from what the present ones leave unexplained.
//!
//! Coordinate descent cannot switch an atom on, because many rows have to begin using it together.
//! So sets of sites that co-occur in the positive residual are searched from many seeds at once,
//! each is fitted as a single atom, and those that lower the objective by more than their largest
//! code costs are taken, best first.

use crate::caps::Wishes;
use crate::coding::{Coder, Desk};
use crate::level::{Level, set_code};
use crate::parallel::Pool;
use crate::params::Lambda;
use crate::rng::Rng;
use crate::rows::{Entry, Lists, Rows};
use crate::search::{search, seeds};
use crate::single::{Leftover, Proposal, Scratch, breakpoints, conclude, fall};

/// Seeds of a round at most, for small dictionaries.
const SEEDS: usize = 32;

/// Puts new atoms into free places while each lowers the objective by more than `least`.
///
/// Returns how many were put in.
pub(crate) fn grow(
    level: &mut Level,
    pool: &Pool,
    lambda: Lambda,
    rng: &mut Rng,
    least: f64,
) -> usize {
    let free: Vec<usize> = (0..level.n_atoms())
        .filter(|&atom| level.caps[atom] <= 0.0)
        .collect();
    if free.is_empty() {
        return 0;
    }
    let mut left = leftovers(level, pool, lambda);
    let rows = Rows::from_lists(&left, level.dictionary.n_sites());
    if rows.is_empty() {
        return 0;
    }
    let columns = rows.columns();
    let weight = &level.target.weight;
    let leftover = Leftover {
        rows,
        columns,
        weight,
        lambda,
    };
    let seeds = seeds(
        &leftover,
        2 * free.len().min(SEEDS.max(level.n_atoms() / 2)),
        rng,
    );
    let scratch = || Scratch::new(leftover.rows.len(), leftover.rows.n_sites());
    let mut found = pool.map(seeds.len(), scratch, |scratch, at| {
        search(&leftover, scratch, seeds[at])
    });
    found.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    let mut free = free.into_iter();
    let mut n_new = 0;
    for proposal in found {
        if free.len() == 0 || proposal.gain <= least {
            break;
        }
        let proposal = refit(&proposal, &left, &level.target.weight, lambda);
        if proposal.gain > least
            && let Some(atom) = free.next()
        {
            accept(level, &mut left, atom, proposal);
            n_new += 1;
        }
    }
    n_new
}

/// The positive residual of every row, by site.
fn leftovers(level: &Level, pool: &Pool, lambda: Lambda) -> Lists {
    let ratio = lambda.ratio();
    let coder = Coder {
        dictionary: &level.dictionary,
        caps: &level.caps,
        ratio,
    };
    let desk = || Desk::new(level.dictionary.n_sites(), 0);
    pool.map(level.n_rows(), desk, |desk, row| {
        if level.target.weight[row] <= 0.0 {
            return Vec::new();
        }
        coder.load(desk, level.target.rows.row(row), &level.codes[row]);
        let mut left: Vec<Entry> = desk.positive().collect();
        left.sort_unstable_by_key(|entry| entry.index);
        left
    })
}

/// Puts an atom in place and takes what it explains off the leftovers.
fn accept(level: &mut Level, left: &mut Lists, atom: usize, proposal: Proposal) {
    level.caps[atom] = proposal
        .users
        .iter()
        .map(|user| user.value)
        .fold(0.0, f32::max);
    for user in &proposal.users {
        let row = user.index as usize;
        set_code(&mut level.codes[row], atom as u32, user.value);
        for member in &proposal.members {
            if let Ok(at) = left[row].binary_search_by_key(&member.index, |entry| entry.index) {
                left[row][at].value -= user.value * member.value;
            }
        }
        left[row].retain(|entry| entry.value > 1e-6);
    }
    level.dictionary.set(atom, proposal.members);
}

/// The same atom on what earlier ones of this round have left.
fn refit(proposal: &Proposal, left: &Lists, weight: &[f64], lambda: Lambda) -> Proposal {
    let (mut points, mut wishes) = (Vec::new(), Wishes::default());
    for user in &proposal.users {
        let row = user.index as usize;
        breakpoints(&mut points, &proposal.members, &left[row]);
        wishes.add(
            &mut points,
            lambda.ratio(),
            lambda.reconstruction * weight[row],
        );
    }
    let rows = proposal.users.iter().map(|user| user.index);
    conclude(
        proposal.members.clone(),
        rows,
        wishes,
        |row, value, members| {
            let fall =
                fall(members, &left[row as usize], value) - lambda.ratio() * f64::from(value);
            lambda.reconstruction * weight[row as usize] * fall
        },
    )
}
