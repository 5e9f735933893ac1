#![allow(clippy::needless_range_loop, reason = "slow twins are plain loops")]

use super::*;
use proptest::prelude::*;

/// The slow twin: each atom from A and B in float64, one after the other.
fn slow(second: &Matrix, products: &[Vec<f64>], atoms: &mut [Vec<f64>], which: &[u32]) {
    for &atom in which {
        let atom = atom as usize;
        let own = f64::from(second.row(atom)[atom]);
        let mut new = atoms[atom].clone();
        for (site, new) in new.iter_mut().enumerate() {
            let made: f64 = (0..atoms.len())
                .map(|other| f64::from(second.row(atom)[other]) * atoms[other][site])
                .sum();
            *new = (*new + (products[atom][site] - made) / own).max(0.0);
        }
        let norm = new.iter().map(|v| v * v).sum::<f64>().sqrt().max(1.0);
        atoms[atom] = new.iter().map(|v| v / norm).collect();
    }
}

/// Sums of rows (codes times random atoms) in residual form, and B.
fn sums(codes: &Matrix, rows: &Matrix, atoms: &Matrix) -> (Statistics, Vec<Vec<f64>>) {
    let (n_atoms, n_sites) = (atoms.n_rows(), atoms.width());
    let mut sums = Statistics::new(n_atoms, n_sites);
    let mut products = vec![vec![0.0; n_sites]; n_atoms];
    for row in 0..rows.n_rows() {
        for i in 0..n_atoms {
            for j in 0..n_atoms {
                sums.second.row_mut(i)[j] += codes.row(row)[i] * codes.row(row)[j];
            }
            for site in 0..n_sites {
                products[i][site] += f64::from(codes.row(row)[i] * rows.row(row)[site]);
            }
        }
    }
    for i in 0..n_atoms {
        for site in 0..n_sites {
            let made: f64 = (0..n_atoms)
                .map(|j| f64::from(sums.second.row(i)[j]) * f64::from(atoms.row(j)[site]))
                .sum();
            sums.pull.row_mut(i)[site] = (products[i][site] - made) as f32;
        }
    }
    (sums, products)
}

fn random(n_rows: usize, width: usize, seed: u64, density: f64) -> Matrix {
    let mut rng = crate::rng::Rng::new(seed, 0, 0);
    let flat: Vec<f32> = (0..n_rows * width)
        .map(|_| {
            if rng.uniform() < density {
                rng.uniform() as f32
            } else {
                0.0
            }
        })
        .collect();
    Matrix::from_flat(&flat, width)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn equals_one_atom_at_a_time(n_atoms in 1_usize..40, n_sites in 1_usize..90, seed in 0_u64..99) {
        let (codes, rows) = (random(60, n_atoms, seed, 0.6), random(60, n_sites, seed + 1, 0.5));
        let mut atoms = random(n_atoms, n_sites, seed + 2, 0.5);
        let (mut sums, products) = sums(&codes, &rows, &atoms);
        let mut twin: Vec<Vec<f64>> = (0..n_atoms)
            .map(|i| atoms.row(i)[..n_sites].iter().map(|&v| f64::from(v)).collect())
            .collect();
        let which: Vec<u32> = (0..n_atoms as u32).rev().collect();
        let mut steps = Steps::new(n_atoms, n_sites);
        let pool = Pool::new(2).unwrap();
        for block in which.chunks(BLOCK) {
            steps.block(block, &mut atoms, &mut sums, &pool);
        }
        slow(&sums.second, &products, &mut twin, &which);
        for (i, twin) in twin.iter().enumerate() {
            for (site, &slow) in twin.iter().enumerate() {
                prop_assert!((f64::from(atoms.row(i)[site]) - slow).abs() < 2e-3);
                // U is still B - A D.
                let made: f64 = (0..n_atoms)
                    .map(|j| f64::from(sums.second.row(i)[j]) * f64::from(atoms.row(j)[site]))
                    .sum();
                let pull = f64::from(sums.pull.row(i)[site]);
                prop_assert!((pull - (products[i][site] - made)).abs() < 1e-3);
            }
        }
    }
}

#[test]
fn one_atom_by_hand() {
    // Two rows (2, 0) and (0, 1) with codes 1 and 1: A = 2, B = (2, 1), optimum B / A = (1, 0.5),
    // whose norm is above 1: divided by it.
    let mut sums = Statistics::new(1, 2);
    sums.second.row_mut(0)[0] = 2.0;
    let mut atoms = Matrix::from_flat(&[0.0, 1.0], 2);
    sums.pull.row_mut(0)[..2].copy_from_slice(&[2.0, -1.0]);
    let pool = Pool::new(1).unwrap();
    Steps::new(1, 2).block(&[0], &mut atoms, &mut sums, &pool);
    let norm = 1.25_f32.sqrt();
    assert!((atoms.row(0)[0] - 1.0 / norm).abs() < 1e-6);
    assert!((atoms.row(0)[1] - 0.5 / norm).abs() < 1e-6);
}

#[test]
fn the_gram_matrix_follows() {
    let mut atoms = random(37, 50, 5, 0.5);
    let mut panels = Panels::new(&atoms);
    let mut gram = crate::square::correlate::gram(&atoms, &panels);
    for atom in [3, 20] {
        atoms.row_mut(atom)[..50].fill(0.25);
        panels.refresh(&atoms, atom / 16);
    }
    refresh_gram(&[3, 20], &atoms, &panels, &mut gram, &Pool::new(1).unwrap());
    let afresh = crate::square::correlate::gram(&atoms, &Panels::new(&atoms));
    assert_eq!(gram.flat(), afresh.flat());
}

#[test]
fn atoms_that_cannot_follow_their_pull_promise_nothing() {
    // Atom 0 has norm 1 and is pulled along itself and, at zero, below zero: it cannot move. Atom 1
    // is pulled less, but sideways. Atom 2 is inside the ball, and free.
    let mut atoms = Matrix::from_flat(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5], 3);
    let mut sums = Statistics::new(3, 3);
    sums.weight = 1.0;
    let pulls = [[9.0, -7.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.2]];
    for (atom, pull) in pulls.iter().enumerate() {
        sums.second.row_mut(atom)[atom] = 2.0;
        sums.pull.row_mut(atom)[..3].copy_from_slice(pull);
    }
    assert_eq!(most_promising(&atoms, &sums, 2), vec![1, 2]);
    assert_eq!(most_promising(&atoms, &sums, 1), vec![1]);
    // So do the steps.
    let before = atoms.clone();
    Steps::new(3, 3).block(&[0, 1, 2], &mut atoms, &mut sums, &Pool::new(1).unwrap());
    assert_eq!(atoms.row(0), before.row(0));
    assert!((atoms.row(1)[0] - 0.25 / 1.0625_f32.sqrt()).abs() < 1e-6);
    assert!((atoms.row(2)[2] - 0.6).abs() < 1e-6);
}
