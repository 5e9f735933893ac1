//! Moves that no coordinate step can make: removing an atom, joining two that go together.
//!
//! Each is tried on the rows it touches and kept only if the objective falls.

use crate::caps::settle_atom;
use crate::coding::{Coder, Desk};
use crate::level::{Level, set_code};
use crate::parallel::Pool;
use crate::params::Lambda;
use crate::rng::Rng;
use crate::rows::{Entry, Lists};

/// Rows that one round of moves may recode, as a multiple of all rows.
const BUDGET: usize = 4;
/// Rows that are repaired in one round at most.
const MOST_ROWS: usize = 4096;
/// Two atoms go together when they share this fraction of the smaller one's use.
const TOGETHER: f64 = 0.4;

/// Everything that happens to a level is tried through this.
pub(crate) struct Mover<'a> {
    level: &'a mut Level,
    pool: &'a Pool,
    lambda: Lambda,
    /// A move must lower the objective by more than this.
    least: f64,
    /// For each atom all rows that use it, and perhaps others.
    users: Vec<Vec<u32>>,
}

impl<'a> Mover<'a> {
    /// Moves on a level; each must lower the objective by more than `least`.
    pub fn new(level: &'a mut Level, pool: &'a Pool, lambda: Lambda, least: f64) -> Self {
        level.tighten();
        let rows = |list: Vec<Entry>| list.into_iter().map(|entry| entry.index).collect();
        let users = level.users().into_iter().map(rows).collect();
        Self {
            level,
            pool,
            lambda,
            least,
            users,
        }
    }

    /// Recodes all rows thoroughly: also from nothing, and with each atom taken out in turn.
    pub fn repair(&mut self, rng: &mut Rng) {
        let rows = rng.distinct(self.level.n_rows(), MOST_ROWS);
        let codes = self.recoded(&rows, &|row| self.level.codes[row].clone(), true);
        for (&row, codes) in rows.iter().zip(codes) {
            self.level.codes[row as usize] = codes;
        }
        self.level.tighten();
    }

    /// Tries to do without atoms, least used first.
    ///
    /// Returns those that stay, with how much the objective would have risen without them.
    pub fn remove(&mut self) -> Vec<(f64, usize)> {
        let usage = self.level.usage();
        let mut order: Vec<usize> = (0..usage.len()).filter(|&atom| usage[atom] > 0.0).collect();
        order.sort_by(|&a, &b| usage[a].total_cmp(&usage[b]));
        let (mut budget, mut stay) = (BUDGET * self.level.n_rows().min(MOST_ROWS), Vec::new());
        for atom in order {
            let rows = self.rows_using(&[atom]);
            if rows.len() > budget {
                break;
            }
            budget -= rows.len();
            let kept = |codes: &[Entry]| without(codes, atom as u32);
            let rise = self.attempt(&[(atom, Vec::new())], &rows, &kept);
            if rise >= -self.least {
                stay.push((rise, atom));
            }
        }
        stay
    }

    /// Takes an atom away whatever it costs.
    pub fn discard(&mut self, atom: usize) {
        let rows = self.rows_using(&[atom]);
        let least = std::mem::replace(&mut self.least, f64::NEG_INFINITY);
        let kept = |codes: &[Entry]| without(codes, atom as u32);
        self.attempt(&[(atom, Vec::new())], &rows, &kept);
        self.least = least;
    }

    /// Tries to replace one atom of each pair that goes together by the union of both.
    pub fn join(&mut self) -> usize {
        let (mut budget, mut n_joined) = (BUDGET * self.level.n_rows().min(MOST_ROWS), 0);
        for (first, second) in self.pairs() {
            let rows = self.rows_using(&[first, second]);
            let alive = |atom: usize| !self.level.dictionary.atom(atom).is_empty();
            if 2 * rows.len() > budget || !alive(first) || !alive(second) {
                continue;
            }
            budget -= 2 * rows.len();
            let joined =
                self.join_into(first, second, &rows) || self.join_into(second, first, &rows);
            n_joined += usize::from(joined);
        }
        n_joined
    }

    /// Replaces `atom` by its union with `other`, which stays for rows that need it alone.
    fn join_into(&mut self, atom: usize, other: usize, users: &[u32]) -> bool {
        let Some(union) = self.union(atom, other, users) else {
            return false;
        };
        let (index, second) = (atom as u32, other as u32);
        let start = |codes: &[Entry]| {
            let of = |index: u32| {
                codes
                    .iter()
                    .find(|c| c.index == index)
                    .map_or(0.0, |c| c.value)
            };
            let (one, two) = (of(index), of(second));
            let mut out = codes.to_vec();
            let both = if one > 0.0 && two > 0.0 {
                one.max(two)
            } else {
                0.0
            };
            set_code(&mut out, index, both);
            if both > 0.0 {
                set_code(&mut out, second, 0.0);
            }
            out
        };
        let same = self.level.dictionary.atom(other).to_vec();
        self.attempt(&[(atom, union), (other, same)], users, &start) < -self.least
    }

    /// Members of both atoms, in the proportion in which rows use them together, if any still do.
    fn union(&self, atom: usize, other: usize, users: &[u32]) -> Option<Vec<Entry>> {
        let (mut one, mut two) = (0.0, 0.0);
        for &row in users {
            let codes = &self.level.codes[row as usize];
            let of = |atom: usize| {
                codes
                    .iter()
                    .find(|c| c.index == atom as u32)
                    .map(|c| c.value)
            };
            if let (Some(a), Some(b)) = (of(atom), of(other)) {
                (one, two) = (one + a, two + b);
            }
        }
        let largest = f32::max(one, two);
        if largest <= 0.0 {
            return None;
        }
        let mut members: Vec<Entry> = Vec::new();
        for (atom, factor) in [(atom, one / largest), (other, two / largest)] {
            for entry in self.level.dictionary.atom(atom) {
                let value = entry.value * factor;
                match members.binary_search_by_key(&entry.index, |member| member.index) {
                    Ok(at) => members[at].value = (members[at].value + value).min(1.0),
                    Err(at) => members.insert(at, Entry { value, ..*entry }),
                }
            }
        }
        Some(members)
    }

    /// Pairs of atoms that go together, closest first.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let (users, usage) = (self.level.users(), self.level.usage());
        let best = |(): &mut (), atom: usize| self.partner(&users, &usage, atom);
        let found = self.pool.map(users.len(), || (), best);
        let mut pairs: Vec<(f64, usize, usize)> = Vec::new();
        for (atom, partner) in found.into_iter().enumerate() {
            if let Some((share, other)) = partner {
                pairs.push((share, atom.min(other), atom.max(other)));
            }
        }
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        pairs.dedup_by_key(|pair| (pair.1, pair.2));
        pairs.into_iter().map(|(_, a, b)| (a, b)).collect()
    }

    fn partner(&self, users: &Lists, usage: &[f64], atom: usize) -> Option<(f64, usize)> {
        let mut shared = vec![0.0; usage.len()];
        for user in &users[atom] {
            for code in &self.level.codes[user.index as usize] {
                shared[code.index as usize] += f64::from(code.value.min(user.value));
            }
        }
        let share = |other: usize| shared[other] / usage[atom].min(usage[other]);
        let others = (0..usage.len()).filter(|&other| other != atom && shared[other] > 0.0);
        let best = others
            .map(|other| (share(other), other))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        best.filter(|(share, _)| *share > TOGETHER)
    }

    /// Rows that use any of these atoms, ascending.
    fn rows_using(&self, atoms: &[usize]) -> Vec<u32> {
        let mut rows: Vec<u32> = atoms
            .iter()
            .flat_map(|&a| self.users[a].iter().copied())
            .collect();
        rows.sort_unstable();
        rows.dedup();
        let uses = |code: &Entry| atoms.contains(&(code.index as usize));
        rows.retain(|&row| self.level.codes[row as usize].iter().any(uses));
        rows
    }

    /// Changes atoms and recodes the rows; undoes it unless the objective falls enough.
    ///
    /// Returns the rise of the objective, also when undone.
    fn attempt(
        &mut self,
        changes: &[(usize, Vec<Entry>)],
        rows: &[u32],
        start: &(dyn Fn(&[Entry]) -> Vec<Entry> + Sync),
    ) -> f64 {
        let before = self.cost(rows);
        let caps = self.level.caps.clone();
        let old: Vec<(usize, Vec<Entry>)> = changes
            .iter()
            .map(|(atom, _)| (*atom, self.level.dictionary.atom(*atom).to_vec()))
            .collect();
        for (atom, members) in changes {
            self.level.dictionary.set(*atom, members.clone());
        }
        let codes = self.recoded(rows, &|row| start(&self.level.codes[row]), false);
        let mut saved = Vec::with_capacity(rows.len());
        for (&row, new) in rows.iter().zip(codes) {
            saved.push(std::mem::replace(&mut self.level.codes[row as usize], new));
        }
        for (atom, _) in changes {
            self.settle(*atom, rows);
        }
        let rise = self.cost(rows) - before;
        if rise < -self.least {
            for &row in rows {
                for code in &self.level.codes[row as usize] {
                    self.users[code.index as usize].push(row);
                }
            }
            return rise;
        }
        for (&row, codes) in rows.iter().zip(saved) {
            self.level.codes[row as usize] = codes;
        }
        for (atom, members) in old {
            self.level.dictionary.set(atom, members);
        }
        self.level.caps = caps;
        rise
    }

    /// Best cap and codes of a changed atom, all of whose users are among these rows.
    fn settle(&mut self, atom: usize, rows: &[u32]) {
        let mut users = Vec::new();
        for &index in rows {
            let mut codes = self.level.codes[index as usize].iter();
            if let Some(code) = codes.find(|code| code.index == atom as u32) {
                users.push(Entry {
                    index,
                    value: code.value,
                });
            }
        }
        settle_atom(self.level, self.pool, self.lambda, (atom, &users));
    }

    /// Sum of all caps and of these rows' costs.
    fn cost(&self, rows: &[u32]) -> f64 {
        let level = &*self.level;
        let coder = self.coder();
        let desk = || Desk::new(level.dictionary.n_sites(), 0);
        let rows = self.pool.sum(rows.len(), desk, |desk, at| {
            let row = rows[at] as usize;
            coder.load(desk, level.target.rows.row(row), &level.codes[row]);
            level.target.weight[row] * coder.cost(desk, &level.codes[row])
        });
        let caps: f64 = level.caps.iter().map(|&cap| f64::from(cap)).sum();
        self.lambda.dictionary_size * caps + self.lambda.reconstruction * rows
    }

    fn coder(&self) -> Coder<'_> {
        let ratio = self.lambda.ratio();
        Coder {
            dictionary: &self.level.dictionary,
            caps: &self.level.caps,
            ratio,
        }
    }

    fn recoded(
        &self,
        rows: &[u32],
        start: &(dyn Fn(usize) -> Vec<Entry> + Sync),
        thorough: bool,
    ) -> Lists {
        let level = &*self.level;
        let coder = self.coder();
        let desk = || Desk::new(level.dictionary.n_sites(), level.n_atoms());
        self.pool.map(rows.len(), desk, |desk, at| {
            let row = rows[at] as usize;
            let (target, codes) = (level.target.rows.row(row), start(row));
            if thorough {
                coder.repair(desk, target, &codes)
            } else {
                coder.improve(desk, target, &codes)
            }
        })
    }
}

/// Codes without one atom.
fn without(codes: &[Entry], atom: u32) -> Vec<Entry> {
    codes
        .iter()
        .copied()
        .filter(|code| code.index != atom)
        .collect()
}
