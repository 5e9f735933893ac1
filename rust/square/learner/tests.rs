use super::*;
use crate::rng::Rng;

fn schedule(batch: usize) -> Schedule {
    Schedule {
        batch,
        window: 400,
        exponent: 3.0,
        share: 0.5,
        penalty: 0.1,
        tolerance: 1e-3,
        seed: 3,
    }
}

/// Rows of two of eight disjoint groups of five sites each.
pub(crate) fn grouped(n_rows: usize) -> (Vec<i64>, Vec<u32>, Vec<f32>) {
    let mut rng = Rng::new(11, 0, 0);
    let (mut starts, mut sites, mut values) = (vec![0], Vec::new(), Vec::new());
    for _ in 0..n_rows {
        let first = (rng.next() % 7) as u32;
        let second = first + 1 + (rng.next() % u64::from(7 - first)) as u32;
        for group in [first, second] {
            let size = 0.5 + rng.uniform() as f32;
            sites.extend(group * 5..group * 5 + 5);
            values.extend([size; 5]);
        }
        starts.push(sites.len() as i64);
    }
    (starts, sites, values)
}

/// Rows as atoms to start from: the first ones, at norm 1.
fn first_rows(sheet: &Sheet, count: usize) -> Matrix {
    let mut atoms = Matrix::zeros(count, sheet.n_sites());
    for atom in 0..count {
        let norm = sheet.square(atom).sqrt() as f32;
        let mut row = vec![0.0; sheet.n_sites()];
        sheet.spread(atom, &mut row);
        for value in &mut row {
            *value /= norm;
        }
        atoms.row_mut(atom)[..row.len()].copy_from_slice(&row);
    }
    atoms
}

fn bits(state: &State) -> Vec<u32> {
    let arrays = [&state.atoms, &state.sums.second, &state.sums.pull];
    arrays
        .iter()
        .flat_map(|matrix| matrix.flat())
        .map(f32::to_bits)
        .collect()
}

#[test]
fn finds_the_groups_from_composite_rows() {
    let (starts, sites, values) = grouped(600);
    let sheet = Sheet::new(&starts, &sites, &values, 40).unwrap();
    let pool = Pool::new(1).unwrap();
    let mut learner = Learner::new(State::new(first_rows(&sheet, 8)), schedule(32));
    let early = learner.learn(&sheet, 10, &pool);
    learner.learn(&sheet, 60, &pool);
    let late = learner.learn(&sheet, 10, &pool);
    let mean = |running: &Running| (0.1 * running.codes + running.error) / running.rows as f64;
    assert!(mean(&late) < mean(&early));
    let atoms = learner.into_state().atoms;
    for group in 0..8 {
        let inside = |atom: usize| {
            atoms.row(atom)[group * 5..group * 5 + 5]
                .iter()
                .sum::<f32>()
        };
        let best = (0..8).map(inside).fold(0.0, f32::max);
        assert!(best > 0.98 * 5.0_f32.sqrt(), "group {group}: {best}");
    }
}

#[test]
fn resumed_and_threaded_runs_give_the_same_bytes() {
    let (starts, sites, values) = grouped(150);
    let sheet = Sheet::new(&starts, &sites, &values, 40).unwrap();
    let start = || State::new(first_rows(&sheet, 20));
    let run = |threads, parts: &[usize]| {
        let pool = Pool::new(threads).unwrap();
        let mut state = start();
        for &batches in parts {
            // A copy without the drawn order, as after saving and loading.
            state.order = Order::at(state.order.pass, state.order.place);
            let mut learner = Learner::new(state, schedule(64));
            learner.learn(&sheet, batches, &pool);
            state = learner.into_state();
        }
        bits(&state)
    };
    let whole = run(1, &[30]);
    assert_eq!(whole, run(3, &[30]));
    assert_eq!(whole, run(2, &[7, 1, 22]));
}

#[test]
fn a_dropped_atom_leaves_no_trace() {
    let (starts, sites, values) = grouped(100);
    let sheet = Sheet::new(&starts, &sites, &values, 40).unwrap();
    let mut learner = Learner::new(State::new(first_rows(&sheet, 6)), schedule(50));
    let mut one = learner.schedule;
    one.share = 0.01;
    learner.schedule = one;
    learner.learn(&sheet, 1, &Pool::new(1).unwrap());
    let mut state = learner.into_state();
    let before = state.sums.clone();
    state.sums.drop_atom(2, state.atoms.row(2));
    for atom in (0..6).filter(|&atom| atom != 2) {
        for site in 0..40 {
            let back = before.second.row(atom)[2] * state.atoms.row(2)[site];
            let expected = before.pull.row(atom)[site] + back;
            assert!((state.sums.pull.row(atom)[site] - expected).abs() < 1e-4);
        }
    }
    assert!(
        state
            .sums
            .second
            .row(2)
            .iter()
            .all(|value| value.abs() < 1e-12)
    );
}
