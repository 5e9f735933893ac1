//! Codes of one row on a fixed dictionary, from its correlations and the Gram matrix.
//!
//! Minimises `penalty sum r + 1/2 |x - sum r_i d_i|^2` over `0 <= r <= cap`. With the slopes
//! `s = D x - penalty - G r` kept up to date, each step moves the coordinate that can move furthest
//! (Gauss-Southwell) and finds the next one in the same pass over the slopes. Where that is slow,
//! because many codes overlap, cyclic sweeps over the codes in use take over (Wu and Lange 2008).

use pulp::{Arch, Simd, WithSimd};

use crate::square::matrix::{Aligned, Matrix, padded};
use crate::square::product::add_scaled;

/// Greedy steps before sweeps, beside [`STEPS_EACH`] for every code in use.
const STEPS: usize = 48;
const STEPS_EACH: usize = 4;
/// Sweeps over the codes in use before new ones are looked for.
const SWEEPS: usize = 60;
/// Rounds of greedy steps and sweeps.
const ROUNDS: usize = 60;
/// Slopes carry rounding errors of about this fraction of the largest correlation.
const ROUNDING: f32 = 1e-6;
/// The penalty counts as at least this fraction of the largest correlation in the stop tolerance.
const FAINT: f32 = 1e-2;

/// What all rows are coded with.
#[derive(Debug, Clone)]
pub(crate) struct Coder {
    /// Products of atoms, (`n_atoms`, `n_atoms`).
    pub gram: Matrix,
    /// One over the squared norm of each atom; 0 for empty atoms, which are never used.
    inverse: Aligned,
    /// Largest allowed code of each atom.
    caps: Aligned,
    capped: bool,
    /// The number of each place, in the low bits of a float.
    marks: Aligned,
    /// Low bits of a float that hold a place.
    low: u32,
    /// lambda 1 over lambda 2.
    pub penalty: f32,
    /// A row is done when no code would move by more than this times the penalty.
    pub tolerance: f32,
}

/// Scratch memory of one worker: slopes and codes of a row.
#[derive(Debug, Clone)]
pub(crate) struct Desk {
    pub slopes: Aligned,
    pub codes: Aligned,
    active: Vec<u32>,
}

impl Desk {
    /// Scratch memory for this many atoms.
    pub fn new(n_atoms: usize) -> Self {
        Self {
            slopes: Aligned::filled(padded(n_atoms), 0.0),
            codes: Aligned::filled(padded(n_atoms), 0.0),
            active: Vec::new(),
        }
    }
}

impl Coder {
    /// A coder without caps for the Gram matrix of some atoms.
    pub fn new(gram: Matrix, penalty: f32, tolerance: f32) -> Self {
        let n = gram.stride();
        let low = n.next_power_of_two().max(2) as u32 - 1;
        let mut coder = Self {
            inverse: Aligned::filled(n, 0.0),
            caps: Aligned::filled(n, f32::INFINITY),
            capped: false,
            marks: Aligned::filled(n, 0.0),
            low,
            penalty,
            tolerance,
            gram,
        };
        for (at, mark) in coder.marks.iter_mut().enumerate() {
            *mark = f32::from_bits(at as u32);
        }
        coder.refresh();
        coder
    }

    /// Number of atoms.
    pub fn n_atoms(&self) -> usize {
        self.gram.n_rows()
    }

    /// Takes over a changed diagonal of the Gram matrix.
    pub fn refresh(&mut self) {
        for atom in 0..self.gram.n_rows() {
            let square = self.gram.row(atom)[atom];
            self.inverse[atom] = if square > 1e-12 { 1.0 / square } else { 0.0 };
        }
    }

    /// Never uses an atom again.
    pub fn bar(&mut self, atom: usize) {
        self.inverse[atom] = 0.0;
    }

    /// Sets the largest allowed codes.
    pub fn set_caps(&mut self, caps: &[f32]) {
        self.caps[..caps.len()].copy_from_slice(caps);
        self.capped = true;
    }

    /// Codes a row from nothing; `desk.slopes` holds its correlations and then its slopes.
    pub fn code(&self, desk: &mut Desk) {
        desk.codes.fill(0.0);
        let limit = self.start(desk);
        self.settle(desk, limit);
    }

    /// Codes a row from nothing and without one atom.
    pub fn code_without(&self, desk: &mut Desk, atom: usize) {
        desk.slopes[atom] = f32::NEG_INFINITY;
        self.code(desk);
    }

    /// Codes a row starting from `desk.codes`, which must obey the caps.
    pub fn improve(&self, desk: &mut Desk) {
        let limit = self.start(desk);
        for atom in 0..self.n_atoms() {
            if desk.codes[atom] != 0.0 {
                add_scaled(&mut desk.slopes, -desk.codes[atom], self.gram.row(atom));
            }
        }
        self.settle(desk, limit);
    }

    /// Turns correlations into slopes at zero codes; the step length that ends the row.
    fn start(&self, desk: &mut Desk) -> f32 {
        let penalty = self.penalty;
        let slopes = &mut desk.slopes;
        let largest = Arch::new().dispatch(Start { slopes, penalty });
        let limit = self.tolerance * penalty.max(FAINT * largest);
        limit.max(ROUNDING * largest)
    }

    fn settle(&self, desk: &mut Desk, limit: f32) {
        for _ in 0..ROUNDS {
            let coder = self;
            if Arch::new().dispatch(Greedy { coder, desk, limit }) {
                return;
            }
            self.sweep(desk, limit);
        }
    }

    /// Cyclic steps over the codes in use until they settle.
    fn sweep(&self, desk: &mut Desk, limit: f32) {
        desk.active.clear();
        let used = (0..self.n_atoms()).filter(|&atom| desk.codes[atom] > 0.0);
        desk.active.extend(used.map(|atom| atom as u32));
        for _ in 0..SWEEPS {
            let mut furthest = 0.0_f32;
            for at in 0..desk.active.len() {
                let atom = desk.active[at] as usize;
                let step = self.step(&mut desk.codes, &desk.slopes, atom);
                if step != 0.0 {
                    add_scaled(&mut desk.slopes, -step, self.gram.row(atom));
                }
                furthest = furthest.max(step.abs());
            }
            if furthest <= limit {
                return;
            }
        }
    }

    /// The exact step of one code, taken; returns its length.
    #[inline(always)]
    fn step(&self, codes: &mut [f32], slopes: &[f32], atom: usize) -> f32 {
        let old = codes[atom];
        let free = old + slopes[atom] * self.inverse[atom];
        let new = free.max(0.0).min(self.caps[atom]);
        codes[atom] = new;
        new - old
    }
}

/// Takes the penalty from all correlations; returns the largest of them, at least 0.
struct Start<'a> {
    slopes: &'a mut [f32],
    penalty: f32,
}

impl WithSimd for Start<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let penalty = simd.splat_f32s(self.penalty);
        let mut largest = simd.splat_f32s(0.0);
        for slope in S::as_mut_simd_f32s(self.slopes).0 {
            largest = simd.max_f32s(largest, *slope);
            *slope = simd.sub_f32s(*slope, penalty);
        }
        simd.reduce_max_f32s(largest)
    }
}

/// Greedy steps; true when no code would move further than `limit`.
struct Greedy<'a> {
    coder: &'a Coder,
    desk: &'a mut Desk,
    limit: f32,
}

impl WithSimd for Greedy<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> bool {
        if self.coder.capped {
            descend::<S, true>(simd, self)
        } else {
            descend::<S, false>(simd, self)
        }
    }
}

#[inline(always)]
fn descend<S: Simd, const CAPPED: bool>(simd: S, greedy: Greedy) -> bool {
    let Greedy { coder, desk, limit } = greedy;
    let (mut atom, mut step) = (0, 0.0);
    let (mut steps, mut budget) = (0, STEPS);
    while steps < budget {
        let best = advance::<S, CAPPED>(simd, coder, desk, (atom, step)).to_bits();
        if f32::from_bits(best & !coder.low) <= limit {
            return true;
        }
        atom = (best & coder.low) as usize;
        if desk.codes[atom] <= 0.0 {
            budget += STEPS_EACH;
        }
        step = coder.step(&mut desk.codes, &desk.slopes, atom);
        if step == 0.0 {
            return true;
        }
        steps += 1;
    }
    advance::<S, CAPPED>(simd, coder, desk, (atom, step));
    false
}

/// Applies a step to all slopes and finds the longest next one: its length, with the atom's number
/// in the low bits (so lengths are compared to 2^-14 for 512 atoms).
#[inline(always)]
fn advance<S: Simd, const CAPPED: bool>(
    simd: S,
    coder: &Coder,
    desk: &mut Desk,
    (atom, step): (usize, f32),
) -> f32 {
    let n = desk.slopes.len() / S::F32_LANES;
    let mut view = View::<S> {
        slopes: &mut S::as_mut_simd_f32s(&mut desk.slopes).0[..n],
        gram: &S::as_simd_f32s(coder.gram.row(atom)).0[..n],
        codes: &S::as_simd_f32s(&desk.codes).0[..n],
        inverse: &S::as_simd_f32s(&coder.inverse).0[..n],
        caps: &S::as_simd_f32s(&coder.caps).0[..n],
        marks: &S::as_simd_f32s(&coder.marks).0[..n],
        high: simd.splat_f32s(f32::from_bits(!coder.low & 0x7FFF_FFFF)),
        back: simd.splat_f32s(-step),
    };
    // Two running maxima, so that one need not wait for the other.
    let mut even = simd.splat_f32s(0.0);
    let mut odd = even;
    for at in 0..n / 2 {
        even = simd.max_f32s(even, look::<S, CAPPED>(simd, &mut view, 2 * at));
        odd = simd.max_f32s(odd, look::<S, CAPPED>(simd, &mut view, 2 * at + 1));
    }
    if n % 2 == 1 {
        even = simd.max_f32s(even, look::<S, CAPPED>(simd, &mut view, n - 1));
    }
    simd.reduce_max_f32s(simd.max_f32s(even, odd))
}

/// What a step goes through, in vectors.
struct View<'a, S: Simd> {
    slopes: &'a mut [S::f32s],
    gram: &'a [S::f32s],
    codes: &'a [S::f32s],
    inverse: &'a [S::f32s],
    caps: &'a [S::f32s],
    marks: &'a [S::f32s],
    high: S::f32s,
    back: S::f32s,
}

/// Applies the step to one vector; how far its codes could move then, marked with their places.
#[inline(always)]
fn look<S: Simd, const CAPPED: bool>(simd: S, view: &mut View<S>, at: usize) -> S::f32s {
    let slope = simd.mul_add_f32s(view.back, view.gram[at], view.slopes[at]);
    view.slopes[at] = slope;
    let free = simd.mul_f32s(slope, view.inverse[at]);
    let mut length = simd.max_f32s(free, simd.neg_f32s(view.codes[at]));
    if CAPPED {
        length = simd.min_f32s(length, simd.sub_f32s(view.caps[at], view.codes[at]));
    }
    simd.or_f32s(simd.and_f32s(length, view.high), view.marks[at])
}

#[cfg(test)]
mod tests;
