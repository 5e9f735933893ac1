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
use crate::rows::{Entry, Lists};
use crate::search::{search, seeds};
use crate::single::{Leftover, Proposal, Scratch, breakpoints, conclude, fall};

/// Rows that are looked at for one round at most.
const MOST_ROWS: usize = 8192;
/// Seeds of a round at most, for small dictionaries.
const SEEDS: usize = 32;

/// Puts new atoms into free places while each lowers the objective by more than `least`.
///
/// Of many rows a sample is looked at; the others take up the new atoms when they are next coded.
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
    let picked = rng.distinct(level.n_rows(), MOST_ROWS);
    let factor = level.n_rows() as f64 / picked.len() as f64;
    let weight: Vec<f64> = picked
        .iter()
        .map(|&row| factor * level.target.weight[row as usize])
        .collect();
    let mut left = leftovers(level, pool, lambda, &picked);
    let leftover = Leftover::new(&left, level.dictionary.n_sites(), &weight, lambda);
    let n_seeds = 2 * free.len().min(SEEDS.max(level.n_atoms() / 2));
    let mut free = free.into_iter();
    let mut n_new = 0;
    for proposal in proposals(&leftover, pool, n_seeds, rng) {
        if free.len() == 0 || proposal.gain <= least {
            break;
        }
        let proposal = refit(&proposal, &left, &weight, lambda);
        if proposal.gain > least
            && let Some(atom) = free.next()
        {
            explain(&mut left, &proposal);
            accept(level, &picked, atom, proposal);
            n_new += 1;
        }
    }
    n_new
}

/// Single atoms found from many seeds, the most valuable first.
fn proposals(left: &Leftover, pool: &Pool, n_seeds: usize, rng: &mut Rng) -> Vec<Proposal> {
    let seeds = seeds(left, n_seeds, rng);
    let scratch = || Scratch::new(left.rows.len(), left.rows.n_sites());
    let mut found = pool.map(seeds.len(), scratch, |scratch, at| {
        search(left, scratch, seeds[at])
    });
    found.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    found
}

/// The positive residual of some rows, by site.
fn leftovers(level: &Level, pool: &Pool, lambda: Lambda, rows: &[u32]) -> Lists {
    let ratio = lambda.ratio();
    let coder = Coder {
        dictionary: &level.dictionary,
        caps: &level.caps,
        ratio,
    };
    let desk = || Desk::new(level.dictionary.n_sites(), 0);
    pool.map(rows.len(), desk, |desk, at| {
        let row = rows[at] as usize;
        if level.target.weight[row] <= 0.0 {
            return Vec::new();
        }
        coder.load(desk, level.target.rows.row(row), &level.codes[row]);
        let mut left: Vec<Entry> = desk.positive().collect();
        left.sort_unstable_by_key(|entry| entry.index);
        left
    })
}

/// Takes what a new atom explains off the leftovers.
fn explain(left: &mut Lists, proposal: &Proposal) {
    for user in &proposal.users {
        let rest = &mut left[user.index as usize];
        for member in &proposal.members {
            if let Ok(at) = rest.binary_search_by_key(&member.index, |entry| entry.index) {
                rest[at].value -= user.value * member.value;
            }
        }
        rest.retain(|entry| entry.value > 1e-6);
    }
}

/// Puts an atom in place; its users are places in `rows`.
fn accept(level: &mut Level, rows: &[u32], atom: usize, proposal: Proposal) {
    level.caps[atom] = 0.0;
    for user in &proposal.users {
        level.caps[atom] = level.caps[atom].max(user.value);
        let row = rows[user.index as usize] as usize;
        set_code(&mut level.codes[row], atom as u32, user.value);
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
        lambda.dictionary_size,
        |row, value, members| {
            let fall =
                fall(members, &left[row as usize], value) - lambda.ratio() * f64::from(value);
            lambda.reconstruction * weight[row as usize] * fall
        },
    )
}
