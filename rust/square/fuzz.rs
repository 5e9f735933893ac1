//! Arbitrary input at the doors of the squared-error engine: an error or a sound result, never a
//! panic.
//!
//! `PROPTEST_CASES=2000000 cargo test --release square::fuzz` runs for a long time.

use proptest::prelude::*;

use crate::fuzz::{arrays, weight};
use crate::hierarchy::FittedLevel;
use crate::parallel::Pool;
use crate::square::{
    Draft, EncodeParams, LearnParams, Learner, Matrix, Order, Sheet, SquareParams, State,
    checked_atoms, encode, fit_square,
};

/// Ordinary numbers, numbers of any size that may enter, and now and then any bits.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        60 => (0_u8..9).prop_map(|v| f32::from(v) / 8.0),
        30 => (1_f32..10.0, -40_i32..9).prop_map(|(v, e)| v * 10_f32.powi(e)),
        1 => any::<u32>().prop_map(f32::from_bits),
    ]
}

/// Values of up to six atoms over nine sites; now and then one is missing.
fn atoms() -> impl Strategy<Value = Vec<f32>> {
    let all = prop::collection::vec(prop::array::uniform9(value()), 0..7);
    (all, 0_usize..30).prop_map(|(all, lost)| {
        let mut flat = all.concat();
        flat.truncate(flat.len() - usize::from(lost == 0).min(flat.len()));
        flat
    })
}

fn small(atom: f32) -> bool {
    (0.0..=1.0 + 1e-4).contains(&atom)
}

fn sound(level: &FittedLevel, n_rows: usize) -> bool {
    let norm = |atom: &Vec<crate::rows::Entry>| {
        let squares = atom.iter().map(|entry| entry.value * entry.value);
        squares.sum::<f32>()
    };
    let live = |(peak, atom): (&f64, &Vec<crate::rows::Entry>)| (*peak > 0.0) != atom.is_empty();
    let code = |code: &crate::rows::Entry| code.value > 0.0 && code.value.is_finite();
    level.codes.len() == n_rows
        && level.atoms.iter().all(|atom| small(norm(atom)))
        && level.peak.iter().zip(&level.atoms).all(live)
        && level.codes.iter().flatten().all(code)
        && level.usage.iter().all(|usage| usage.is_finite())
}

fn fit_params() -> impl Strategy<Value = SquareParams> {
    let weights = (weight(), weight(), weight());
    let limits = (weight(), weight(), 0_usize..5, 0_usize..40);
    let atoms = prop::collection::vec(0_usize..7, 0..4);
    (atoms, weights, limits, any::<u64>()).prop_map(|(atoms, weights, limits, seed)| SquareParams {
        atoms,
        copies: seed % 2 == 1,
        dictionary_size: weights.0,
        sparsity: weights.1,
        reconstruction: weights.2,
        passes: limits.0.min(3.0),
        tolerance: limits.1,
        max_iterations: limits.2,
        batch: limits.3,
        seed,
        threads: 1,
    })
}

fn learn_params() -> impl Strategy<Value = LearnParams> {
    let weights = (weight(), weight(), weight(), weight());
    let whole = prop_oneof![0_usize..60, any::<usize>()];
    let limits = (whole.clone(), whole, prop_oneof![0.0..1.2_f64, weight()]);
    (weights, limits, any::<u64>()).prop_map(|(weights, limits, seed)| LearnParams {
        batch: limits.0,
        window: limits.1,
        exponent: weights.0,
        share: limits.2,
        sparsity: weights.1,
        reconstruction: weights.2,
        tolerance: weights.3,
        seed,
    })
}

/// Turns a state into one from a file that was tampered with.
fn tampered(mut state: State, at: usize, (value, count): (f32, u64)) -> State {
    match at {
        0 => state.sums.second.row_mut(0)[0] = value,
        1 => state.sums.pull.row_mut(0)[0] = value,
        2 => state.sums.first[0] = value,
        3 => state.sums.mass = value,
        4 => state.sums.weight = value,
        5 => state.seen = count,
        6 => state.exchanged = count,
        7 => state.born[0] = count,
        8 => state.order = Order::at(count, count as usize),
        _ => (),
    }
    state
}

proptest! {
    #[test]
    fn fuzz_fit((starts, sites, values, n_sites) in arrays(value), params in fit_params()) {
        let sheet = Sheet::new(&starts, &sites, &values, n_sites);
        if let (Ok(sheet), Ok(params)) = (sheet, params.check()) {
            let found = fit_square(sheet, &params, &mut |_| true).unwrap();
            let mut n_rows = sheet.len();
            for (level, &n_atoms) in found.levels.iter().zip(&params.atoms) {
                prop_assert!(sound(level, n_rows), "{level:?}");
                prop_assert_eq!(level.atoms.len(), n_atoms);
                n_rows = n_atoms;
            }
        }
    }

    #[test]
    fn fuzz_learning(
        (starts, sites, values, n_sites) in arrays(value),
        atoms in atoms(), params in learn_params(),
        tampering in (0_usize..40, (value(), any::<u64>())),
    ) {
        let sheet = Sheet::new(&starts, &sites, &values, n_sites);
        let atoms = checked_atoms(&atoms, n_sites);
        if let (Ok(sheet), Ok(atoms)) = (sheet, atoms)
            && let Ok(schedule) = params.check(sheet.len())
        {
            let pool = Pool::new(1).unwrap();
            let mut learner = Learner::new(State::new(atoms), schedule);
            learner.learn(&sheet, 7, &pool);
            let state = learner.into_state();
            prop_assert!(state.clone().check().is_ok());
            if let Ok(state) = tampered(state, tampering.0, tampering.1).check() {
                let mut learner = Learner::new(state, schedule);
                let running = learner.learn(&sheet, 3, &pool);
                prop_assert!(running.rows > 0 && running.error >= 0.0 && running.codes >= 0.0);
                let atoms = learner.into_state().atoms.flat();
                prop_assert!(atoms.iter().all(|v| v.is_finite() && *v >= 0.0), "{atoms:?}");
            }
        }
    }

    #[test]
    fn fuzz_encoding(
        (starts, sites, values, n_sites) in arrays(value),
        atoms in atoms(),
        caps in prop::option::of(prop::collection::vec(value(), 0..7)),
        (sparsity, reconstruction, tolerance) in (weight(), weight(), weight()),
    ) {
        let params = EncodeParams { sparsity, reconstruction, tolerance, caps, gap: true };
        let draft = Draft::new(&starts, &sites, &values, n_sites);
        let atoms: Result<Matrix, _> = checked_atoms(&atoms, n_sites);
        if let (Ok(draft), Ok(atoms)) = (draft, atoms)
            && let Ok(how) = params.check(atoms.n_rows())
            && let Ok(codes) = encode(&draft, &atoms, &how, &Pool::new(1).unwrap())
        {
            prop_assert_eq!(codes.len(), draft.len());
            prop_assert!(codes.gaps.iter().all(|gap| gap.is_finite()), "{:?}", codes.gaps);
            for (&atom, &code) in codes.atoms.iter().zip(&codes.values) {
                let cap = how.caps.as_ref().map_or(f32::MAX, |caps| caps[atom as usize]);
                prop_assert!(code > 0.0 && code <= cap);
            }
        }
    }
}
