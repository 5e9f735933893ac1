//! One atom fitted by itself to what is left of the rows, by alternating exact medians.

use crate::caps::Wishes;
use crate::median::{Point, quantile};
use crate::params::Lambda;
use crate::rows::{Entry, Lists, Rows};

const REFINEMENTS: usize = 5;

/// A fitted new atom: its members, the rows that use it, and how much the objective falls.
#[derive(Debug, Clone, Default)]
pub(crate) struct Proposal {
    pub members: Vec<Entry>,
    pub users: Vec<Entry>,
    pub gain: f64,
}

/// What the present atoms leave unexplained: the positive residual, by row and by site.
pub(crate) struct Leftover<'a> {
    pub rows: Rows,
    pub columns: Rows,
    pub weight: &'a [f64],
    pub lambda: Lambda,
}

/// Scratch memory of one worker.
pub(crate) struct Scratch {
    hits: Vec<f32>,
    hit_rows: Vec<u32>,
    pub counts: Vec<f64>,
    slot: Vec<u32>,
    points: Vec<Point>,
}

/// The proposal for given members and wishes of some rows; `gain` is what one row's code is worth.
pub(crate) fn conclude(
    members: Vec<Entry>,
    rows: impl Iterator<Item = u32>,
    mut wishes: Wishes,
    price: f64,
    gain: impl Fn(u32, f32, &[Entry]) -> f64,
) -> Proposal {
    let cap = wishes.cap(price);
    let users: Vec<Entry> = rows
        .zip(&wishes.free)
        .map(|(index, free)| Entry {
            index,
            value: free.min(cap),
        })
        .filter(|user| user.value > 0.0)
        .collect();
    let peak = users.iter().map(|user| user.value).fold(0.0, f32::max);
    let sum: f64 = users
        .iter()
        .map(|user| gain(user.index, user.value, &members))
        .sum();
    Proposal {
        members,
        users,
        gain: sum - price * f64::from(peak),
    }
}

/// Breakpoints of one row's cost in the atom's code.
pub(crate) fn breakpoints(points: &mut Vec<Point>, members: &[Entry], row: &[Entry]) {
    points.clear();
    let mut at = 0;
    for member in members {
        while at < row.len() && row[at].index < member.index {
            at += 1;
        }
        let present = at < row.len() && row[at].index == member.index;
        let rest = if present { row[at].value } else { 0.0 };
        points.push(Point {
            at: rest / member.value,
            weight: member.value,
        });
    }
}

/// How much a row's absolute error falls when it uses the atom this much.
pub(crate) fn fall(members: &[Entry], row: &[Entry], value: f32) -> f64 {
    let (mut at, mut sum) = (0, 0.0);
    for member in members {
        while at < row.len() && row[at].index < member.index {
            at += 1;
        }
        let present = at < row.len() && row[at].index == member.index;
        let rest = if present { row[at].value } else { 0.0 };
        sum += f64::from(rest - (rest - value * member.value).abs());
    }
    sum
}

impl Scratch {
    /// Scratch memory for rows and sites of these numbers.
    pub fn new(n_rows: usize, n_sites: usize) -> Self {
        Self {
            hits: vec![0.0; n_rows],
            hit_rows: Vec::new(),
            counts: vec![0.0; n_sites],
            slot: vec![u32::MAX; n_sites],
            points: Vec::new(),
        }
    }
}

impl<'a> Leftover<'a> {
    /// What is left of rows of these weights.
    pub fn new(left: &Lists, n_sites: usize, weight: &'a [f64], lambda: Lambda) -> Self {
        let rows = Rows::from_lists(left, n_sites);
        let columns = rows.columns();
        Self {
            rows,
            columns,
            weight,
            lambda,
        }
    }

    /// A single atom fitted from a set of sites by alternating exact steps.
    pub fn refine(&self, scratch: &mut Scratch, sites: &[u32]) -> Proposal {
        let member = |&index: &u32| Entry { index, value: 1.0 };
        let mut members: Vec<Entry> = sites.iter().map(member).collect();
        let mut best = Proposal::default();
        for _ in 0..REFINEMENTS {
            let found = self.assign(scratch, members);
            members = self.members(scratch, &found.users);
            let better = found.gain > best.gain * (1.0 + 1e-6);
            if better {
                best = found;
            }
            if members.is_empty() || !better {
                break;
            }
        }
        best
    }

    /// Codes and cap for given members, over all rows.
    fn assign(&self, scratch: &mut Scratch, members: Vec<Entry>) -> Proposal {
        for member in &members {
            for entry in self.columns.row(member.index as usize) {
                let hits = &mut scratch.hits[entry.index as usize];
                if *hits <= 0.0 {
                    scratch.hit_rows.push(entry.index);
                }
                *hits += member.value;
            }
        }
        let mass: f64 = members.iter().map(|member| f64::from(member.value)).sum();
        let ratio = self.lambda.ratio();
        scratch.hit_rows.sort_unstable();
        let (mut wishes, mut rows) = (Wishes::default(), Vec::new());
        for row in scratch.hit_rows.drain(..) {
            let hits = f64::from(std::mem::take(&mut scratch.hits[row as usize]));
            if 2.0 * hits > mass + ratio {
                breakpoints(&mut scratch.points, &members, self.rows.row(row as usize));
                let scale = self.lambda.reconstruction * self.weight[row as usize];
                wishes.add(&mut scratch.points, ratio, scale);
                rows.push(row);
            }
        }
        let price = self.lambda.dictionary_size;
        conclude(
            members,
            rows.into_iter(),
            wishes,
            price,
            |row, value, members| {
                let fall = fall(members, self.rows.row(row as usize), value);
                let scale = self.lambda.reconstruction * self.weight[row as usize];
                scale * (fall - ratio * f64::from(value))
            },
        )
    }

    /// Members by weighted medians over the rows that use the atom, scaled to a largest one of 1.
    fn members(&self, scratch: &mut Scratch, users: &[Entry]) -> Vec<Entry> {
        scratch.counts.fill(0.0);
        let mut total = 0.0;
        for user in users {
            let weight = self.weight[user.index as usize] * f64::from(user.value);
            total += weight;
            for entry in self.rows.row(user.index as usize) {
                scratch.counts[entry.index as usize] += weight;
            }
        }
        let sites = (0..self.rows.n_sites() as u32)
            .filter(|&site| scratch.counts[site as usize] > 0.5 * total);
        let sites: Vec<u32> = sites.collect();
        let mut columns = self.gather(scratch, &sites, users);
        let mut members: Vec<Entry> = Vec::new();
        for (&index, points) in sites.iter().zip(&mut columns) {
            let absent = total - scratch.counts[index as usize];
            let value = quantile(points, 0.5 * total - absent).clamp(0.0, 1.0);
            members.push(Entry { index, value });
        }
        let largest = members
            .iter()
            .map(|member| member.value)
            .fold(0.0, f32::max);
        for member in &mut members {
            member.value = (member.value / largest).min(1.0);
        }
        members.retain(|member| member.value > 0.0);
        members
    }

    /// For each of some sites the breakpoints of the users that hold it.
    fn gather(&self, scratch: &mut Scratch, sites: &[u32], users: &[Entry]) -> Vec<Vec<Point>> {
        for (slot, &site) in sites.iter().enumerate() {
            scratch.slot[site as usize] = slot as u32;
        }
        let mut columns = vec![Vec::new(); sites.len()];
        for user in users {
            let weight = (self.weight[user.index as usize] * f64::from(user.value)) as f32;
            for entry in self.rows.row(user.index as usize) {
                let slot = scratch.slot[entry.index as usize];
                if slot != u32::MAX {
                    let at = entry.value / user.value;
                    columns[slot as usize].push(Point { at, weight });
                }
            }
        }
        for &site in sites {
            scratch.slot[site as usize] = u32::MAX;
        }
        columns
    }
}
