//! Pieces of a level's atoms, from which the next, finer level starts.
//!
//! The objective alone would let a level copy the one above: where atoms share little, the identity
//! is its cheapest code. So a finer level starts from clusters of experts inside the atoms, none
//! larger than half of a mean atom, and descends from there: pieces stay apart where they pay. Sites
//! are split by how often they are active together in the rows that use the atom.

use crate::level::Level;
use crate::parallel::Pool;
use crate::rows::{Entry, Lists};

/// Users of an atom that are looked at.
const LOOK: usize = 512;
/// Pieces that share this fraction of their members are one.
const SAME: f64 = 0.6;
/// Entries from which a site counts as a member.
const MEMBER: f32 = 0.5;
/// Members of a piece at least: a lone expert is no collaboration.
const SMALLEST: usize = 2;

/// Pieces, and for each atom which of them it is made of.
pub(crate) struct Pieces {
    pub atoms: Lists,
    pub parts: Vec<Vec<u32>>,
}

/// At most `n` pieces of the atoms, most used atoms first; an atom that finds no room has none.
pub(crate) fn pieces(level: &Level, pool: &Pool, n: usize) -> Pieces {
    let (users, usage) = (level.users(), level.usage());
    let most = largest_piece(level);
    let cuts = pool.map(
        level.n_atoms(),
        || (),
        |(), atom| cut(level, level.dictionary.atom(atom), &users[atom], most),
    );
    let mut order: Vec<usize> = (0..usage.len()).filter(|&atom| usage[atom] > 0.0).collect();
    order.sort_by(|&a, &b| usage[b].total_cmp(&usage[a]));
    let mut out = Pieces {
        atoms: Vec::new(),
        parts: vec![Vec::new(); level.n_atoms()],
    };
    for atom in order {
        for piece in &cuts[atom] {
            let alike = out
                .atoms
                .iter()
                .position(|known| overlap(known, piece) > SAME);
            if let Some(known) = alike {
                out.parts[atom].push(known as u32);
            } else if out.atoms.len() < n {
                out.parts[atom].push(out.atoms.len() as u32);
                out.atoms.push(piece.clone());
            }
        }
        out.parts[atom].sort_unstable();
        out.parts[atom].dedup();
    }
    out
}

/// Shared members over all members of two sorted lists.
fn overlap(a: &[Entry], b: &[Entry]) -> f64 {
    let holds = |entry: &&Entry| b.binary_search_by_key(&entry.index, |e| e.index).is_ok();
    let shared = a.iter().filter(holds).count();
    shared as f64 / (a.len() + b.len() - shared).max(1) as f64
}

/// Half the mean number of members of a live atom.
fn largest_piece(level: &Level) -> usize {
    let live = (0..level.n_atoms()).filter(|&atom| level.caps[atom] > 0.0);
    let size = |atom| {
        level
            .dictionary
            .atom(atom)
            .iter()
            .filter(|e| e.value >= MEMBER)
            .count()
    };
    let (sum, n_live) = live.fold((0, 0), |(sum, n), atom| (sum + size(atom), n + 1));
    (sum / (2 * n_live.max(1))).max(SMALLEST)
}

/// Members cut into pieces of at most `most`.
fn cut(level: &Level, members: &[Entry], users: &[Entry], most: usize) -> Vec<Vec<Entry>> {
    if members.len() <= most || members.len() < 2 * SMALLEST {
        return vec![members.to_vec()];
    }
    let halves = halves(level, members, users);
    halves
        .iter()
        .flat_map(|half| cut(level, half, users, most))
        .collect()
}

/// Members cut in two where they go together least, at least two on either side.
fn halves(level: &Level, members: &[Entry], users: &[Entry]) -> [Vec<Entry>; 2] {
    let near = closeness(level, members, users);
    let m = members.len();
    let (mut poles, mut least) = ((0, 1), f64::INFINITY);
    for a in 0..m {
        for b in a + 1..m {
            if near[a * m + b] < least {
                (poles, least) = ((a, b), near[a * m + b]);
            }
        }
    }
    let lean = |e: usize| near[e * m + poles.1] - near[e * m + poles.0];
    let mut order: Vec<usize> = (0..m).filter(|&e| e != poles.0 && e != poles.1).collect();
    order.sort_by(|&a, &b| lean(a).total_cmp(&lean(b)).then(a.cmp(&b)));
    let n_first = order.partition_point(|&e| lean(e) <= 0.0).clamp(1, m - 3);
    let mut second = vec![false; m];
    second[poles.1] = true;
    for &e in &order[n_first..] {
        second[e] = true;
    }
    let side = |side: bool| {
        let of = members.iter().zip(&second).filter(|(_, s)| **s == side);
        of.map(|(entry, _)| *entry).collect()
    };
    [side(false), side(true)]
}

/// For each pair of members: rows with both over rows with either, among the atom's users.
fn closeness(level: &Level, members: &[Entry], users: &[Entry]) -> Vec<f64> {
    let m = members.len();
    let mut both = vec![0.0; m * m];
    let stride = users.len().div_ceil(LOOK).max(1);
    for user in users.iter().step_by(stride) {
        let row = level.target.rows.row(user.index as usize);
        let held = |entry: &Entry| row.binary_search_by_key(&entry.index, |e| e.index).is_ok();
        let present: Vec<usize> = (0..m).filter(|&e| held(&members[e])).collect();
        for &a in &present {
            for &b in &present {
                both[a * m + b] += 1.0;
            }
        }
    }
    let share = |at: usize| {
        let (a, b) = (at / m, at % m);
        both[at] / f64::max(both[a * m + a] + both[b * m + b] - both[at], 1.0)
    };
    (0..m * m).map(share).collect()
}
