//! Codes of one row on a fixed dictionary: non-negative, capped L1 regression.
//!
//! Minimises `lambda1/lambda2 * sum r + |x - D r|_1` over `0 <= r <= cap`. Single coordinates are
//! exact weighted medians; new atoms enter by the largest exact gain. Where single moves stick,
//! [`Coder::repair`] takes an atom out and lets others fill its place.

use crate::dictionary::Dictionary;
use crate::median::{Point, quantile};
use crate::rows::Entry;

/// Residuals below this fraction of the row's largest value count as zero.
const FLAT: f32 = 1e-5;
/// A newcomer must lower the cost by more than this fraction of the row's sum.
const LEAST: f64 = 1e-4;
/// Steps below this fraction of a code call for no further sweep.
const MATERIAL: f32 = 0.01;
/// Newcomers whose exact gain is computed, of those with the steepest slope.
const SHORTLIST: usize = 6;
const SWEEPS: usize = 12;
const NEWCOMERS: usize = 96;
/// Newcomers with this fraction of the best one's gain come in with it.
const NEARLY: f64 = 0.5;
/// No atom is barred.
pub(crate) const NONE: u32 = u32::MAX;

/// What every row is coded with.
#[derive(Clone, Copy)]
pub(crate) struct Coder<'a> {
    pub dictionary: &'a Dictionary,
    pub caps: &'a [f32],
    /// lambda 1 over lambda 2.
    pub ratio: f64,
}

/// Scratch memory of one worker: a row's residual and what touches it.
pub(crate) struct Desk {
    pub residual: Vec<f32>,
    marked: Vec<bool>,
    touched: Vec<u32>,
    score: Vec<f32>,
    points: Vec<Point>,
    flat: f32,
    /// What a newcomer must gain.
    least: f64,
}

impl Desk {
    /// Scratch memory for a dictionary of this size.
    pub fn new(n_sites: usize, n_atoms: usize) -> Self {
        Self {
            residual: vec![0.0; n_sites],
            marked: vec![false; n_sites],
            touched: Vec::new(),
            score: vec![0.0; n_atoms],
            points: Vec::new(),
            flat: 0.0,
            least: 0.0,
        }
    }

    /// Puts a row in, without any atom.
    pub fn load(&mut self, row: &[Entry]) {
        for site in self.touched.drain(..) {
            self.residual[site as usize] = 0.0;
            self.marked[site as usize] = false;
        }
        let largest = row.iter().map(|entry| entry.value).fold(0.0, f32::max);
        self.flat = FLAT * largest;
        self.least = LEAST * row.iter().map(|entry| f64::from(entry.value)).sum::<f64>();
        self.add(row, 1.0);
    }

    /// Adds `factor` times some entries to the residual.
    pub fn add(&mut self, entries: &[Entry], factor: f32) {
        for entry in entries {
            let site = entry.index as usize;
            self.residual[site] += factor * entry.value;
            if !self.marked[site] {
                self.marked[site] = true;
                self.touched.push(entry.index);
            }
        }
    }

    /// Sum of absolute residuals.
    pub fn error(&self) -> f64 {
        let each = |&site: &u32| f64::from(self.residual[site as usize].abs());
        self.touched.iter().map(each).sum()
    }

    /// Sites with a residual clearly above zero.
    pub fn positive(&self) -> impl Iterator<Item = Entry> {
        let each = |&index: &u32| Entry {
            index,
            value: self.residual[index as usize],
        };
        self.touched
            .iter()
            .map(each)
            .filter(|entry| entry.value > self.flat)
    }
}

impl Coder<'_> {
    /// Loads a row and takes away what its codes explain.
    pub fn load(&self, desk: &mut Desk, row: &[Entry], codes: &[Entry]) {
        desk.load(row);
        for code in codes {
            desk.add(self.dictionary.atom(code.index as usize), -code.value);
        }
    }

    /// The row's part of the objective, divided by lambda 2 and the row's weight.
    pub fn cost(&self, desk: &Desk, codes: &[Entry]) -> f64 {
        let sum: f64 = codes.iter().map(|code| f64::from(code.value)).sum();
        self.ratio * sum + desk.error()
    }

    /// Better codes for a row, starting from `codes`; never worse than them.
    pub fn improve(&self, desk: &mut Desk, row: &[Entry], codes: &[Entry]) -> Vec<Entry> {
        self.load(desk, row, codes);
        let before = self.cost(desk, codes);
        let mut found = codes.to_vec();
        self.descend(desk, &mut found, NONE);
        self.load(desk, row, &found);
        let after = self.cost(desk, &found);
        if after < before {
            found
        } else {
            codes.to_vec()
        }
    }

    /// Like `improve`, then from nothing, then with each atom taken out in turn.
    pub fn repair(&self, desk: &mut Desk, row: &[Entry], codes: &[Entry]) -> Vec<Entry> {
        let mut best = self.improve(desk, row, codes);
        self.load(desk, row, &best);
        let mut least = self.cost(desk, &best);
        let mut attempt = |start: Vec<Entry>, barred: u32, best: &mut Vec<Entry>| {
            let mut trial = start;
            self.load(desk, row, &trial);
            self.descend(desk, &mut trial, barred);
            self.descend(desk, &mut trial, NONE);
            self.load(desk, row, &trial);
            let cost = self.cost(desk, &trial);
            if cost < least * (1.0 - 1e-6) {
                (least, *best) = (cost, trial);
            }
        };
        attempt(Vec::new(), NONE, &mut best);
        for code in best.clone() {
            let others = best.iter().filter(|other| other.index != code.index);
            attempt(others.copied().collect(), code.index, &mut best);
        }
        best
    }

    /// Coordinate descent with newcomers until none helps; `desk` holds the residual of `codes`.
    fn descend(&self, desk: &mut Desk, codes: &mut Vec<Entry>, barred: u32) {
        for _ in 0..NEWCOMERS {
            self.sweep(desk, codes);
            if !self.admit(desk, codes, barred) {
                break;
            }
        }
        codes.retain(|code| code.value > 0.0);
        codes.sort_unstable_by_key(|code| code.index);
    }

    /// Exact minimisation of each code in turn until nothing moves.
    fn sweep(&self, desk: &mut Desk, codes: &mut [Entry]) {
        for _ in 0..SWEEPS {
            let mut moved = false;
            for code in codes.iter_mut() {
                let value = self.line(desk, code.index, code.value);
                let step = value - code.value;
                if step.abs() > desk.flat {
                    desk.add(self.dictionary.atom(code.index as usize), -step);
                    moved |= step.abs() > MATERIAL * f32::max(value, code.value);
                    code.value = value;
                }
            }
            if !moved || codes.len() < 2 {
                break;
            }
        }
    }

    /// The best value of one code, all others fixed; the nearest one if there are several.
    ///
    /// The slopes to either side only need the signs of the members' residuals, so a code that is
    /// best already costs one pass; only a code that moves looks for its breakpoint.
    fn line(&self, desk: &mut Desk, atom: u32, old: f32) -> f32 {
        let members = self.dictionary.atom(atom as usize);
        let (mut above, mut below) = (0.0_f32, 0.0_f32);
        for member in members {
            let rest = desk.residual[member.index as usize];
            above += if rest > desk.flat { member.value } else { 0.0 };
            below += if rest < -desk.flat { member.value } else { 0.0 };
        }
        let mass = self.dictionary.mass(atom as usize);
        let least = -1e-6 * mass;
        let up = self.ratio + mass - 2.0 * f64::from(above);
        let down = mass - self.ratio - 2.0 * f64::from(below);
        let cap = self.caps[atom as usize];
        if up < least && old < cap {
            (old + self.reach(desk, atom, 1.0, -0.5 * up)).min(cap)
        } else if down < least && old > 0.0 {
            (old - self.reach(desk, atom, -1.0, -0.5 * down)).max(0.0)
        } else {
            old
        }
    }

    /// How far a code can go in one direction until its slope has risen by twice `rise`.
    fn reach(&self, desk: &mut Desk, atom: u32, sign: f32, rise: f64) -> f32 {
        desk.points.clear();
        for member in self.dictionary.atom(atom as usize) {
            let rest = sign * desk.residual[member.index as usize];
            if rest > desk.flat {
                let at = rest / member.value;
                let weight = member.value;
                desk.points.push(Point { at, weight });
            }
        }
        quantile(&mut desk.points, rise)
    }

    /// Gives codes to unused atoms: the one that lowers the row's cost most, and others nearly as good.
    fn admit(&self, desk: &mut Desk, codes: &mut Vec<Entry>, barred: u32) -> bool {
        let mut list = self.shortlist(desk, codes, barred);
        for candidate in &mut list {
            candidate.0 = self.trial(desk, candidate.1).1;
        }
        list.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let enough = f64::max(list.first().map_or(0.0, |best| NEARLY * best.0), desk.least);
        let before = codes.len();
        for &(_, index) in &list {
            let (value, gain) = self.trial(desk, index);
            if gain > enough {
                desk.add(self.dictionary.atom(index as usize), -value);
                codes.push(Entry { index, value });
            }
        }
        codes.len() > before
    }

    /// The best code of an unused atom and what it gains.
    fn trial(&self, desk: &mut Desk, atom: u32) -> (f32, f64) {
        let value = self.line(desk, atom, 0.0);
        (value, self.gain(desk, atom, value))
    }

    /// Atoms whose code would grow from zero, with how steeply the cost would fall; a few steepest.
    fn shortlist(&self, desk: &mut Desk, codes: &[Entry], barred: u32) -> Vec<(f64, u32)> {
        self.rate(desk);
        let mut list: Vec<(f64, u32)> = Vec::with_capacity(SHORTLIST + 1);
        let mut least = f64::from(desk.flat);
        for (atom, &score) in desk.score.iter().enumerate() {
            let slope = 2.0 * f64::from(score) - self.dictionary.mass(atom) - self.ratio;
            let steep = slope * f64::from(self.caps[atom]);
            let index = atom as u32;
            if steep <= least || index == barred || codes.iter().any(|code| code.index == index) {
                continue;
            }
            let place = list.partition_point(|other| other.0 >= steep);
            list.insert(place, (steep, index));
            if list.len() > SHORTLIST {
                list.pop();
                least = list[SHORTLIST - 1].0;
            }
        }
        list
    }

    /// For each atom the mass of its members that still have something to explain.
    fn rate(&self, desk: &mut Desk) {
        desk.score.fill(0.0);
        for &site in &desk.touched {
            if desk.residual[site as usize] > desk.flat {
                for entry in self.dictionary.at(site as usize) {
                    desk.score[entry.index as usize] += entry.value;
                }
            }
        }
    }

    /// How much the row's cost falls when an unused atom gets this code.
    fn gain(&self, desk: &Desk, atom: u32, value: f32) -> f64 {
        let each = |member: &Entry| {
            let rest = desk.residual[member.index as usize];
            f64::from(rest.abs() - (rest - value * member.value).abs())
        };
        let fit: f64 = self.dictionary.atom(atom as usize).iter().map(each).sum();
        fit - self.ratio * f64::from(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries(dense: &[f32]) -> Vec<Entry> {
        let all = dense.iter().enumerate();
        all.filter(|(_, v)| **v > 0.0)
            .map(|(i, &value)| Entry {
                index: i as u32,
                value,
            })
            .collect()
    }

    fn brute(coder: Coder, row: &[Entry], codes: &[Entry], atom: u32, cap: f32) -> (f64, f64) {
        let mut desk = Desk::new(8, 4);
        let mut cost = |value: f32| {
            let mut trial = codes.to_vec();
            crate::level::set_code(&mut trial, atom, value);
            coder.load(&mut desk, row, &trial);
            coder.cost(&desk, &trial)
        };
        let grid = (0..=4000).map(|step| cap * step as f32 / 4000.0);
        let best = grid.map(&mut cost).fold(f64::INFINITY, f64::min);
        let mut desk = Desk::new(8, 4);
        let old = codes
            .iter()
            .find(|c| c.index == atom)
            .map_or(0.0, |c| c.value);
        coder.load(&mut desk, row, codes);
        (cost(coder.line(&mut desk, atom, old)), best)
    }

    fn dense(levels: u8) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((0..levels).prop_map(|v| f32::from(v) / 4.0), 8)
    }

    proptest! {
        #[test]
        fn line_equals_brute_force(
            atoms in prop::collection::vec(dense(5), 4), row in dense(9),
            codes in prop::collection::vec(0_u8..4, 4), ratio in 0.0_f64..1.5,
        ) {
            let lists = atoms.iter().map(|atom| entries(atom)).collect();
            let dictionary = Dictionary::from_atoms(lists, 8);
            let caps = [2.0; 4];
            let coder = Coder { dictionary: &dictionary, caps: &caps, ratio };
            let codes = entries(&codes.iter().map(|&c| f32::from(c) / 2.0).collect::<Vec<_>>());
            let (found, best) = brute(coder, &entries(&row), &codes, 2, 2.0);
            prop_assert!(found <= best + 1e-4, "{found} > {best}");
        }

        #[test]
        fn codes_stay_in_their_box_and_never_get_worse(
            atoms in prop::collection::vec(dense(5), 4), row in dense(9), cap in 0.0_f32..2.0,
        ) {
            let lists = atoms.iter().map(|atom| entries(atom)).collect();
            let dictionary = Dictionary::from_atoms(lists, 8);
            let caps = [cap; 4];
            let coder = Coder { dictionary: &dictionary, caps: &caps, ratio: 0.1 };
            let row = entries(&row);
            let mut desk = Desk::new(8, 4);
            let start: Vec<Entry> = (0..4).filter(|_| cap > 0.0)
                .map(|index| Entry { index, value: cap / 2.0 }).collect();
            coder.load(&mut desk, &row, &start);
            let before = coder.cost(&desk, &start);
            for codes in [coder.improve(&mut desk, &row, &start), coder.repair(&mut desk, &row, &start)] {
                prop_assert!(codes.iter().all(|c| c.value > 0.0 && c.value <= cap));
                prop_assert!(codes.windows(2).all(|pair| pair[0].index < pair[1].index));
                coder.load(&mut desk, &row, &codes);
                prop_assert!(coder.cost(&desk, &codes) <= before + 1e-9);
            }
        }
    }

    #[test]
    fn an_empty_row_has_no_codes() {
        let dictionary = Dictionary::from_atoms(vec![entries(&[1.0; 8])], 8);
        let coder = Coder {
            dictionary: &dictionary,
            caps: &[1.0],
            ratio: 0.0,
        };
        assert!(coder.improve(&mut Desk::new(8, 1), &[], &[]).is_empty());
    }
}
