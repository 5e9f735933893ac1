//! Where level 1 starts: rows of the data as atoms, and for many rows a sample of them.
//!
//! Rows hold whole groups of sites, so that atoms only have to lose what their users do not share;
//! from nothing, groups must be found first. What a dictionary is made of shows in a few thousand
//! rows: all moves are tried there, and all rows only refine the result.

use crate::coding::{Coder, Desk};
use crate::dictionary::Dictionary;
use crate::level::{Level, Target};
use crate::parallel::Pool;
use crate::params::Lambda;
use crate::rng::Rng;
use crate::rows::Entry;

/// Rows of the smallest sample.
const SAMPLE: usize = 4096;
/// Rows of the smallest sample, for each atom.
const ROWS_PER_ATOM: usize = 8;
/// Each sample is larger than the one before by this factor.
const GROWTH: usize = 8;

/// Sizes of the samples to fit before all of `n_rows`, ascending.
pub(crate) fn sample_sizes(n_rows: usize, n_atoms: usize) -> Vec<usize> {
    let first = SAMPLE.max(ROWS_PER_ATOM * n_atoms);
    let sizes = std::iter::successors(Some(first), |size| size.checked_mul(GROWTH));
    sizes.take_while(|size| 2 * size <= n_rows).collect()
}

/// A level without atoms over some of the rows of another.
pub(crate) fn sample(level: &Level, n: usize, rng: &mut Rng) -> Level {
    let picked = rng.distinct(level.n_rows(), n);
    let factor = level.n_rows() as f64 / n as f64;
    let weight = picked
        .iter()
        .map(|&row| factor * level.target.weight[row as usize])
        .collect();
    let rows = level.target.rows.pick(&picked);
    Level::empty(Target::new(rows, weight), level.n_atoms())
}

/// Makes an atom of each of some rows that hold anything, scaled to a largest entry of 1.
pub(crate) fn start_from_rows(level: &mut Level, pool: &Pool, lambda: Lambda, rng: &mut Rng) {
    let filled: Vec<u32> = (0..level.n_rows() as u32)
        .filter(|&row| !level.target.rows.row(row as usize).is_empty())
        .collect();
    let picked = rng.distinct(filled.len(), level.n_atoms().min(filled.len()));
    let mut atoms = vec![Vec::new(); level.n_atoms()];
    for (atom, &at) in picked.iter().enumerate() {
        let row = level.target.rows.row(filled[at as usize] as usize);
        let largest = row.iter().map(|entry| entry.value).fold(0.0, f32::max);
        level.caps[atom] = largest;
        let scaled = |entry: &Entry| Entry {
            value: entry.value / largest,
            ..*entry
        };
        atoms[atom] = row.iter().map(scaled).collect();
    }
    level.dictionary = Dictionary::from_atoms(atoms, level.dictionary.n_sites());
    code(level, pool, lambda);
}

/// Takes given atoms and caps and codes all rows with them.
pub(crate) fn start_from(
    level: &mut Level,
    pool: &Pool,
    lambda: Lambda,
    (dictionary, caps): (Dictionary, Vec<f32>),
) {
    (level.dictionary, level.caps) = (dictionary, caps);
    code(level, pool, lambda);
}

/// Codes of all rows from nothing, under the present caps.
fn code(level: &mut Level, pool: &Pool, lambda: Lambda) {
    let coder = Coder {
        dictionary: &level.dictionary,
        caps: &level.caps,
        ratio: lambda.ratio(),
    };
    let desk = || Desk::new(level.dictionary.n_sites(), level.n_atoms());
    level.codes = pool.map(level.n_rows(), desk, |desk, row| {
        coder.improve(desk, level.target.rows.row(row), &[])
    });
    level.tighten();
    level.clear_dead();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::terms;
    use crate::rows::Rows;
    use crate::update::update;

    #[test]
    fn samples_grow_to_less_than_half_of_the_rows() {
        assert!(sample_sizes(8191, 10).is_empty());
        assert_eq!(sample_sizes(8192, 10), [4096]);
        assert_eq!(sample_sizes(25_028, 512), [4096]);
        assert_eq!(sample_sizes(604_109, 512), [4096, 32_768, 262_144]);
        assert_eq!(sample_sizes(604_109, 4096), [32_768, 262_144]);
    }

    /// Rows of three sites that overlap, `times` times over; each copy weighs less.
    fn overlapping(times: usize) -> Level {
        let row = |at: usize| {
            let entry = |place: usize| Entry {
                index: ((at + place) % 12) as u32,
                value: 0.25 * ((at * 7 + place * 3) % 5 + 1) as f32,
            };
            let mut row: Vec<Entry> = (0..3).map(entry).collect();
            row.sort_by_key(|entry| entry.index);
            row
        };
        let lists = (0..40 * times).map(|at| row(at / times)).collect();
        let weight = vec![1.0 / (40 * times) as f64; 40 * times];
        Level::empty(Target::new(Rows::from_lists(&lists, 12), weight), 8)
    }

    #[test]
    fn rows_twice_have_the_same_codes_atoms_and_objective() {
        let pool = Pool::new(1).unwrap();
        let lambda = Lambda {
            dictionary_size: 1.0,
            sparsity: 0.5,
            reconstruction: 30.0,
        };
        let mut begin = overlapping(1);
        start_from_rows(&mut begin, &pool, lambda, &mut Rng::new(1, 0, 0));
        let (mut once, mut twice) = (overlapping(1), overlapping(2));
        let first = (begin.dictionary, begin.caps);
        start_from(&mut once, &pool, lambda, first.clone());
        start_from(&mut twice, &pool, lambda, first);
        for _ in 0..4 {
            for (row, codes) in twice.codes.iter().enumerate() {
                assert_eq!(codes, &once.codes[row / 2]);
            }
            let totals = [&once, &twice].map(|level| terms(level, &pool, lambda).total);
            assert!((totals[0] - totals[1]).abs() <= 1e-9 * totals[0]);
            for level in [&mut once, &mut twice] {
                update(level, &pool, None);
                code(level, &pool, lambda);
            }
            assert_eq!(once.dictionary.atoms(), twice.dictionary.atoms());
        }
    }
}
