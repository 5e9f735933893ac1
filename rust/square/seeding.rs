//! Atoms to start from.

use crate::rng::Rng;
use crate::square::matrix::Matrix;
use crate::square::product::{sum_of_squares, to_norm_one};
use crate::square::sheet::Sheet;

/// Parts smaller than this fraction of their row's norm are not worth an atom.
const SMALL: f32 = 0.1;
/// Parts whose cosine is above this count as one.
const ALIKE: f32 = 0.95;

/// Random rows at norm 1, without rows of zeros; too few rows leave atoms of zeros.
pub(crate) fn random_rows(sheet: &Sheet, n_atoms: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed, 0, 7);
    let mut rows: Vec<u32> = (0..sheet.len() as u32).collect();
    let mut atoms = Matrix::zeros(n_atoms, sheet.n_sites());
    let mut filled = 0;
    for last in (0..rows.len()).rev() {
        if filled == n_atoms {
            break;
        }
        rows.swap(last, ((rng.next() >> 32) as usize * (last + 1)) >> 32);
        let row = rows[last] as usize;
        if sheet.square(row) > 0.0 {
            sheet.spread(row, atoms.row_mut(filled));
            to_norm_one(atoms.row_mut(filled));
            filled += 1;
        }
    }
    atoms
}

/// Parts of rows: what a row shares with the one most like it, and what is left of it then.
///
/// For the atoms of a coarser level: rows themselves would only be copied. The parts of rows with
/// more weight come first; parts that are alike count once.
pub(crate) fn parts(rows: &Matrix, weights: &[f64], n_atoms: usize) -> Matrix {
    let mut order: Vec<usize> = (0..rows.n_rows())
        .filter(|&row| weights[row] > 0.0)
        .collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let mut atoms = Matrix::zeros(n_atoms, rows.width());
    let mut filled = 0;
    for &row in &order {
        for part in split(rows, row, &order) {
            let new = |atom: usize| dot(atoms.row(atom), &part) < ALIKE;
            if filled < n_atoms && (0..filled).all(new) {
                atoms.row_mut(filled).copy_from_slice(&part);
                filled += 1;
            }
        }
    }
    atoms
}

/// The shared and the own part of a row, at norm 1.
fn split(rows: &Matrix, row: usize, others: &[usize]) -> Vec<Vec<f32>> {
    let own = rows.row(row);
    let shared = |other: usize| -> Vec<f32> {
        own.iter()
            .zip(rows.row(other))
            .map(|(a, b)| a.min(*b))
            .collect()
    };
    let others = others.iter().copied().filter(|&other| other != row);
    let sizes = others.map(|other| (sum_of_squares(&shared(other)), other));
    let nearest = sizes.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    let common = nearest.map_or_else(|| vec![0.0; own.len()], |(_, other)| shared(other));
    let rest = own.iter().zip(&common).map(|(a, b)| a - b).collect();
    let least = SMALL * SMALL * sum_of_squares(own);
    let mut found: Vec<Vec<f32>> = [common, rest]
        .into_iter()
        .filter(|part| sum_of_squares(part) > least)
        .collect();
    for part in &mut found {
        to_norm_one(part);
    }
    found
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_by_what_they_share() {
        let flat = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let found = parts(&Matrix::from_flat(&flat, 4), &[3.0, 2.0, 1.0], 6);
        let place = |row: usize| found.row(row)[..4].iter().position(|&value| value > 0.99);
        // Shared site 1 first, then each row's own site; the third row shares nothing.
        assert_eq!(
            [place(0), place(1), place(2), place(3)],
            [Some(1), Some(0), Some(2), Some(3)]
        );
        assert_eq!(place(4), None);
    }

    #[test]
    fn random_rows_are_different_rows_at_norm_one() {
        let sheet = Sheet::new(&[0, 1, 1, 2, 3], &[0, 1, 2], &[2.0, 3.0, 4.0], 3).unwrap();
        let atoms = random_rows(&sheet, 5, 3);
        let mut sums = [0.0; 3];
        for atom in 0..5 {
            (0..3).for_each(|site| sums[site] += atoms.row(atom)[site]);
        }
        assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6));
    }
}
