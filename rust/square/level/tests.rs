use super::*;
use crate::rng::Rng;
use proptest::prelude::*;

/// The objective by its definition, in float64.
fn slow(level: &Level) -> f64 {
    let (n_atoms, n_sites) = (level.atoms.n_rows(), level.atoms.width());
    let mut peaks = vec![0.0_f64; n_atoms];
    let mut rows = 0.0;
    for row in 0..level.sheet.len() {
        let mut rest = vec![0.0_f32; n_sites];
        level.sheet.spread(row, &mut rest);
        let mut rest: Vec<f64> = rest.iter().map(|&x| f64::from(x)).collect();
        let mut sum = 0.0;
        let (atoms, values) = level.codes.row(row);
        for (&atom, &value) in atoms.iter().zip(values) {
            let (atom, value) = (atom as usize, f64::from(value));
            peaks[atom] = peaks[atom].max(value);
            sum += value;
            for (rest, &d) in rest.iter_mut().zip(level.atoms.row(atom)) {
                *rest -= value * f64::from(d);
            }
        }
        let error: f64 = rest.iter().map(|e| e * e).sum();
        let weights = level.weights;
        rows += level.row_weights[row]
            * (weights.sparsity * sum + weights.reconstruction * 0.5 * error);
    }
    level.weights.size * peaks.iter().sum::<f64>() + rows
}

fn random(n_rows: usize, n_sites: usize, seed: u64) -> (Vec<i64>, Vec<u32>, Vec<f32>) {
    let mut rng = Rng::new(seed, 0, 0);
    let (mut starts, mut sites, mut values) = (vec![0], Vec::new(), Vec::new());
    for _ in 0..n_rows {
        for site in 0..n_sites as u32 {
            if rng.uniform() < 0.4 {
                sites.push(site);
                values.push(0.1 + 2.0 * rng.uniform() as f32);
            }
        }
        starts.push(sites.len() as i64);
    }
    (starts, sites, values)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_step_raises_the_objective(
        seed in 0_u64..999, n_atoms in 1_usize..24, size in 0.0_f64..0.4, sparsity in 0.0_f64..0.5,
    ) {
        let (n_rows, n_sites) = (70, 20);
        let (starts, sites, values) = random(n_rows, n_sites, seed);
        let sheet = Sheet::new(&starts, &sites, &values, n_sites).unwrap();
        let mut rng = Rng::new(seed, 1, 0);
        let flat: Vec<f32> = (0..n_atoms * n_sites).map(|_| 0.3 * rng.uniform() as f32).collect();
        let row_weights: Vec<f64> = (0..n_rows).map(|_| rng.uniform() / n_rows as f64).collect();
        let weights = Weights { size, sparsity, reconstruction: 1.5 };
        let pool = Pool::new(1).unwrap();
        let mut level = Level::new(sheet, row_weights, Matrix::from_flat(&flat, n_sites), weights, &pool);
        for _ in 0..8 {
            let by_hand = slow(&level);
            prop_assert!((level.terms.total - by_hand).abs() <= 1e-5 * by_hand);
            level.improve(&pool);
            prop_assert!(slow(&level) <= by_hand * (1.0 + 2e-6), "{} > {by_hand}", slow(&level));
            for atom in 0..n_atoms {
                let norm = sum_of_squares(level.atoms.row(atom)).sqrt();
                prop_assert!(norm <= 1.0 + 1e-5);
                prop_assert!(level.atoms.row(atom).iter().all(|&value| value >= 0.0));
                prop_assert_eq!(norm > 0.0, level.peaks[atom] > 0.0);
            }
        }
    }
}

#[test]
fn an_atom_that_does_not_pay_is_gone() {
    // One row (2) of weight 1 on one atom (1): free code 2 - 0.5; with s = 2 above 1.5 it is off.
    let sheet = Sheet::new(&[0, 1], &[0], &[2.0], 1).unwrap();
    let pool = Pool::new(1).unwrap();
    let fitted = |size| {
        let weights = Weights {
            size,
            sparsity: 0.5,
            reconstruction: 1.0,
        };
        Level::new(
            sheet,
            vec![1.0],
            Matrix::from_flat(&[1.0], 1),
            weights,
            &pool,
        )
    };
    // At s = 1 the code is 0.5: 1 * 0.5 + 0.5 * 0.5 + 1.5^2 / 2.
    assert!((fitted(1.0).terms.total - 1.875).abs() < 1e-5);
    let off = fitted(2.0);
    assert_eq!(
        (off.peaks[0].to_bits(), off.atoms.row(0)[0].to_bits()),
        (0, 0)
    );
    assert!((off.terms.total - 2.0).abs() < 1e-6);
}

#[test]
fn rows_twice_change_nothing() {
    let (starts, sites, values) = random(60, 20, 4);
    let mut doubled = (starts.clone(), sites.clone(), values.clone());
    let offset = starts[starts.len() - 1];
    doubled
        .0
        .extend(starts[1..].iter().map(|start| start + offset));
    doubled.1.extend(&sites);
    doubled.2.extend(&values);
    let weights = Weights {
        size: 0.2,
        sparsity: 0.1,
        reconstruction: 1.5,
    };
    let pool = Pool::new(1).unwrap();
    let mut rng = Rng::new(4, 1, 0);
    let flat: Vec<f32> = (0..8 * 20).map(|_| 0.3 * rng.uniform() as f32).collect();
    let begin = |(starts, sites, values): &'_ (Vec<i64>, Vec<u32>, Vec<f32>)| {
        let sheet = Sheet::new(starts, sites, values, 20).unwrap();
        let row_weights = vec![1.0 / sheet.len() as f64; sheet.len()];
        let atoms = Matrix::from_flat(&flat, 20);
        let mut level = Level::new(sheet, row_weights, atoms, weights, &pool);
        let mut totals = vec![level.terms.total];
        for _ in 0..6 {
            level.improve(&pool);
            totals.push(level.terms.total);
        }
        (totals, level.atoms.flat(), level.peaks.clone())
    };
    let (once, twice) = (begin(&(starts, sites, values)), begin(&doubled));
    for (a, b) in once.0.iter().zip(&twice.0) {
        assert!((a - b).abs() <= 1e-5 * a, "{a} {b}");
    }
    let pairs = once.1.iter().zip(&twice.1);
    assert!(
        pairs
            .chain(once.2.iter().zip(&twice.2))
            .all(|(a, b)| (a - b).abs() < 2e-3)
    );
}
