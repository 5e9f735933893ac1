//! One atom's whole column of codes and its largest code, jointly and exactly.
//!
//! Over the rows that use atom i the objective is `m + sum_c F_c(min(u_c, m))` in the cap m, where
//! `u_c` minimises the convex piecewise-linear `F_c`. Its minimiser is a weighted quantile of all
//! breakpoints below the `u_c`; it is 0, and the atom off, when the slopes at 0 sum to above -1.

use crate::coding::{Coder, Desk};
use crate::level::{Level, set_code};
use crate::median::{Point, quantile};
use crate::parallel::Pool;
use crate::params::Lambda;
use crate::rows::Entry;

/// Rows below which an atom is done by one worker.
const ALONE: usize = 16;
/// Codes of at least this fraction of the largest are near the cap.
const NEAR: f32 = 0.5;

/// What rows want of one atom: their free codes, and how the slope of their costs rises.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Each row's code without the cap.
    pub free: Vec<f32>,
    /// Sum of the slopes at zero, each at most 0, in units of the objective.
    slope: f64,
    /// Where the slopes rise from there to 0.
    rises: Vec<Point>,
}

impl Wishes {
    /// Adds a row with weight `scale` (lambda 2 times the row's weight).
    ///
    /// `points` are the breakpoints: where the member's residual is 0, weighted by the member.
    pub fn add(&mut self, points: &mut [Point], ratio: f64, scale: f64) {
        self.add_from(points, ratio, scale, 0.0);
    }

    /// The same where codes may not be below `floor`.
    fn add_from(&mut self, points: &mut [Point], ratio: f64, scale: f64, floor: f32) {
        let mass: f64 = points.iter().map(|point| f64::from(point.weight)).sum();
        points.sort_unstable_by(|a, b| a.at.total_cmp(&b.at));
        let mut slope = ratio - mass;
        let mut next = 0;
        while next < points.len() && points[next].at <= floor {
            slope += 2.0 * f64::from(points[next].weight);
            next += 1;
        }
        self.slope += slope.min(0.0) * scale;
        let mut free = floor;
        for point in &points[next..] {
            if slope >= 0.0 {
                break;
            }
            let rise = (2.0 * f64::from(point.weight)).min(-slope);
            slope += 2.0 * f64::from(point.weight);
            free = point.at;
            self.rises.push(Point {
                at: free,
                weight: (rise * scale) as f32,
            });
        }
        self.free.push(free);
    }

    /// Adds the rows of another set.
    fn extend(&mut self, other: &Self) {
        self.free.extend_from_slice(&other.free);
        self.slope += other.slope;
        self.rises.extend_from_slice(&other.rises);
    }

    /// The cap that minimises `price * m + sum of the rows' costs`; 0 if the atom is not worth it.
    pub fn cap(&mut self, price: f64) -> f32 {
        self.cap_from(price, 0.0)
    }

    /// The codes under the best cap of at least `floor`.
    fn codes(mut self, price: f64, floor: f32) -> Vec<f32> {
        let cap = self.cap_from(price, floor);
        self.free.iter().map(|free| free.min(cap)).collect()
    }

    /// The same among caps of at least the floor with which the rows were added.
    fn cap_from(&mut self, price: f64, floor: f32) -> f32 {
        if price + self.slope >= 0.0 {
            return floor;
        }
        let cap = quantile(&mut self.rises, -(price + self.slope));
        let highest = || self.free.iter().copied().fold(floor, f32::max);
        if cap.is_finite() { cap } else { highest() }
    }
}

/// Sets every atom's codes and cap to the joint optimum over the rows that use it.
pub(crate) fn settle(level: &mut Level, pool: &Pool, lambda: Lambda) {
    let users = level.users();
    for (atom, rows) in users.iter().enumerate() {
        settle_atom(level, pool, lambda, (atom, rows));
    }
}

/// The same for one atom and its users.
///
/// The codes near the cap decide where it goes, unless it falls out of their reach.
pub(crate) fn settle_atom(
    level: &mut Level,
    pool: &Pool,
    lambda: Lambda,
    (atom, users): (usize, &[Entry]),
) {
    let floor = NEAR * users.iter().map(|user| user.value).fold(0.0, f32::max);
    let near: Vec<Entry> = users
        .iter()
        .copied()
        .filter(|user| user.value >= floor)
        .collect();
    let found =
        wishes(level, pool, lambda, (atom, &near, floor)).codes(lambda.dictionary_size, floor);
    level.caps[atom] = 0.0;
    if found.iter().any(|&code| code > floor) {
        put(level, atom, &near, &found);
    } else {
        let found =
            wishes(level, pool, lambda, (atom, users, 0.0)).codes(lambda.dictionary_size, 0.0);
        put(level, atom, users, &found);
    }
}

/// Codes of some users of an atom, and the cap that follows.
fn put(level: &mut Level, atom: usize, users: &[Entry], values: &[f32]) {
    for (user, &value) in users.iter().zip(values) {
        set_code(&mut level.codes[user.index as usize], atom as u32, value);
        level.caps[atom] = level.caps[atom].max(value);
    }
}

fn wishes(
    level: &Level,
    pool: &Pool,
    lambda: Lambda,
    (atom, users, floor): (usize, &[Entry], f32),
) -> Wishes {
    let ratio = lambda.ratio();
    let coder = Coder {
        dictionary: &level.dictionary,
        caps: &level.caps,
        ratio,
    };
    let members = level.dictionary.atom(atom);
    let new_desk = || (Desk::new(level.dictionary.n_sites(), 0), Vec::new());
    let chunks = pool.map(
        users.len().div_ceil(ALONE),
        new_desk,
        |(desk, points), chunk| {
            let mut wishes = Wishes::default();
            for user in &users[chunk * ALONE..((chunk + 1) * ALONE).min(users.len())] {
                let row = user.index as usize;
                coder.load(desk, level.target.rows.row(row), &level.codes[row]);
                points.clear();
                points.extend(members.iter().map(|member| {
                    let rest = desk.residual[member.index as usize] + member.value * user.value;
                    Point {
                        at: rest / member.value,
                        weight: member.value,
                    }
                }));
                let scale = lambda.reconstruction * level.target.weight[row];
                wishes.add_from(points, ratio, scale, floor);
            }
            wishes
        },
    );
    let mut all = Wishes::default();
    for chunk in &chunks {
        all.extend(chunk);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Lines = Vec<Vec<(i8, u8)>>;

    fn points(row: &[(i8, u8)]) -> Vec<Point> {
        let point = |&(at, w): &(i8, u8)| Point {
            at: f32::from(at),
            weight: f32::from(w) / 4.0,
        };
        row.iter().map(point).collect()
    }

    fn cost(rows: &Lines, ratio: f64, cap: f32, free: &[f32]) -> f64 {
        let one = |row: &Vec<(i8, u8)>, r: f32| {
            let each = |p: &Point| f64::from(p.weight * (p.at - r).abs());
            ratio * f64::from(r) + points(row).iter().map(each).sum::<f64>()
        };
        let rows = rows.iter().zip(free);
        f64::from(cap) + rows.map(|(row, &u)| one(row, u.min(cap))).sum::<f64>()
    }

    proptest! {
        #[test]
        fn cap_and_codes_equal_brute_force(
            rows in prop::collection::vec(prop::collection::vec((-3_i8..6, 1_u8..5), 1..6), 1..6),
            ratio in 0.0_f64..1.0,
        ) {
            let mut wishes = Wishes::default();
            for row in &rows {
                wishes.add(&mut points(row), ratio, 1.0);
            }
            let found = cost(&rows, ratio, wishes.cap(1.0), &wishes.free);
            // All breakpoints are integers, so is an optimal cap and an optimal code.
            for cap in 0..6_i8 {
                let cap = f32::from(cap);
                let brute = rows.iter().map(|row| {
                    let line = vec![row.clone()];
                    (0..6_i8).map(f32::from).filter(|r| *r <= cap)
                        .map(|r| cost(&line, ratio, r, &[r]) - f64::from(r))
                        .fold(f64::INFINITY, f64::min)
                }).sum::<f64>() + f64::from(cap);
                prop_assert!(found <= brute + 1e-5, "{found} > {brute} at {cap}");
            }
        }
    }
}
