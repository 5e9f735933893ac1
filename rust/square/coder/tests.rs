use super::*;
use proptest::prelude::*;

/// Atoms as flat rows, with their Gram matrix by three loops.
fn gram(atoms: &[f32], n_sites: usize) -> Matrix {
    let n = atoms.len() / n_sites;
    let row = |i: usize| &atoms[i * n_sites..(i + 1) * n_sites];
    let mut gram = Matrix::zeros(n, n);
    for i in 0..n {
        for j in 0..n {
            gram.row_mut(i)[j] = row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum();
        }
    }
    gram
}

fn load(desk: &mut Desk, atoms: &[f32], x: &[f32]) {
    desk.slopes.fill(0.0);
    for (slope, atom) in desk.slopes.iter_mut().zip(atoms.chunks(x.len())) {
        *slope = atom.iter().zip(x).map(|(a, x)| a * x).sum();
    }
}

fn cost(atoms: &[f32], x: &[f32], codes: &[f64], penalty: f64) -> f64 {
    let rest = |site: usize| {
        let made = codes.iter().enumerate();
        let made = made.map(|(i, r)| r * f64::from(atoms[i * x.len() + site]));
        f64::from(x[site]) - made.sum::<f64>()
    };
    let error: f64 = (0..x.len()).map(|site| rest(site) * rest(site)).sum();
    penalty * codes.iter().sum::<f64>() + 0.5 * error
}

/// The slow twin: plain cyclic coordinate descent in float64.
fn slow(atoms: &[f32], x: &[f32], penalty: f64, caps: &[f32]) -> Vec<f64> {
    let n = caps.len();
    let gram = gram(atoms, x.len());
    let mut codes = vec![0.0_f64; n];
    for _ in 0..20_000 {
        for i in 0..n {
            let own = &atoms[i * x.len()..(i + 1) * x.len()];
            let mut slope: f64 = own
                .iter()
                .zip(x)
                .map(|(a, x)| f64::from(*a) * f64::from(*x))
                .sum();
            slope -= penalty;
            for (j, code) in codes.iter().enumerate() {
                slope -= f64::from(gram.row(i)[j]) * code;
            }
            let square = f64::from(gram.row(i)[i]);
            if square > 0.0 {
                codes[i] = (codes[i] + slope / square).max(0.0).min(f64::from(caps[i]));
            }
        }
    }
    codes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn equals_slow_descent(
        atoms in prop::collection::vec(0_u8..4, 12..90),
        x in prop::collection::vec(0_u8..6, 6),
        penalty in 0.0_f64..3.0,
        cap in prop::option::of(0.0_f32..1.5),
    ) {
        let n = atoms.len() / 6;
        let atoms: Vec<f32> = atoms[..n * 6].iter().map(|&a| f32::from(a) / 2.0).collect();
        let x: Vec<f32> = x.iter().map(|&x| f32::from(x)).collect();
        let caps = vec![cap.unwrap_or(f32::INFINITY); n];
        let mut coder = Coder::new(gram(&atoms, 6), penalty as f32, 1e-5);
        coder.set_caps(&caps);
        let mut desk = Desk::new(n);
        load(&mut desk, &atoms, &x);
        coder.code(&mut desk);
        let found: Vec<f64> = desk.codes[..n].iter().map(|&r| f64::from(r)).collect();
        prop_assert!(found.iter().zip(&caps).all(|(&r, &cap)| r >= 0.0 && r <= f64::from(cap)));
        let best = cost(&atoms, &x, &slow(&atoms, &x, penalty, &caps), penalty);
        let got = cost(&atoms, &x, &found, penalty);
        prop_assert!(got <= best + 1e-4 * (1.0 + best), "{got} > {best}");
        // From a start, the same optimum.
        load(&mut desk, &atoms, &x);
        coder.improve(&mut desk);
        let again: Vec<f64> = desk.codes[..n].iter().map(|&r| f64::from(r)).collect();
        prop_assert!(cost(&atoms, &x, &again, penalty) <= got + 1e-4 * (1.0 + got));
    }
}

#[test]
fn two_atoms_by_hand() {
    // d = (1, 0) and (0.6, 0.8), x = (2, 1), penalty 0.5: stationarity G r = (1.5, 1.5)
    // with G = ((1, 0.6), (0.6, 1)) gives r = (0.9375, 0.9375).
    let atoms = [1.0, 0.0, 0.6, 0.8];
    let coder = Coder::new(gram(&atoms, 2), 0.5, 1e-6);
    let mut desk = Desk::new(2);
    load(&mut desk, &atoms, &[2.0, 1.0]);
    coder.code(&mut desk);
    assert!(desk.codes[..2].iter().all(|r| (r - 0.9375).abs() < 1e-5));
}

#[test]
fn every_instruction_set_takes_the_same_steps() {
    let atoms: Vec<f32> = (0..40 * 6).map(|i| ((i * 31) % 7) as f32 / 4.0).collect();
    let coder = Coder::new(gram(&atoms, 6), 0.5, 1e-5);
    let run = |scalar: bool| {
        let mut desk = Desk::new(40);
        load(&mut desk, &atoms, &[2.0, 1.0, 0.0, 3.0, 1.0, 1.0]);
        let limit = coder.start(&mut desk);
        let greedy = Greedy {
            coder: &coder,
            desk: &mut desk,
            limit,
        };
        if scalar {
            greedy.with_simd(pulp::Scalar);
        } else {
            Arch::new().dispatch(greedy);
        }
        desk.codes[..40].to_vec()
    };
    for (one, other) in run(true).iter().zip(run(false)) {
        assert!((one - other).abs() < 1e-3);
    }
}
