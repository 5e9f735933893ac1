//! Exchange of atoms that others can stand in for, for what the latest batch leaves unexplained.
//!
//! Coordinate steps cannot leave a dictionary that holds an atom twice, or two atoms and their sum,
//! while another is missing. What an atom is worth is estimated from the sums: coded by the others
//! (no penalty), it leaves the distance t and needs codes of sum q; without it the objective rises
//! by about `1/2 A_kk t^2 + penalty m_k (q - 1)` per row, `m_k` its mean code. What a residual is
//! worth as a new atom is measured on the other rows of the batch.

use crate::parallel::Pool;
use crate::square::coder::{Coder, Desk};
use crate::square::matrix::Matrix;
use crate::square::panels::Panels;
use crate::square::product::{Side, to_norm_one};
use crate::square::slot::Slot;
use crate::square::statistics::Statistics;

/// A newcomer must promise this many times what the atom it replaces is worth.
const MARGIN: f64 = 1.0;

/// What every atom is worth per row, in units of the objective over lambda 2.
pub(crate) fn worths(coder: &Coder, sums: &Statistics, pool: &Pool) -> Vec<f64> {
    let free = Coder::new(coder.gram.clone(), 0.0, 1e-2);
    let n_atoms = coder.n_atoms();
    let desk = || Desk::new(n_atoms);
    pool.map(n_atoms, desk, |desk, atom| {
        worth(
            alone(&free, desk, atom),
            sums,
            atom,
            f64::from(coder.penalty),
        )
    })
}

/// What an atom is worth per row, given the distance and sum of codes of what stands in for it.
pub(crate) fn worth(
    (distance, sum): (f64, f64),
    sums: &Statistics,
    atom: usize,
    penalty: f64,
) -> f64 {
    let mass = f64::from(sums.mass).max(1e-30);
    let square = f64::from(sums.second.row(atom)[atom]) / mass;
    let mean = f64::from(sums.first[atom]) / mass;
    0.5 * square * distance + penalty * mean * (sum - 1.0).max(0.0)
}

/// Squared distance of an atom from what the others make of it, and the sum of their codes.
pub(crate) fn alone(free: &Coder, desk: &mut Desk, atom: usize) -> (f64, f64) {
    let row = free.gram.row(atom);
    desk.slopes.copy_from_slice(row);
    free.code_without(desk, atom);
    let pairs = desk.codes.iter().zip(row).zip(desk.slopes.iter());
    let used = pairs.filter(|((code, _), _)| **code > 0.0);
    let made: f64 = used
        .map(|((&code, &product), &slope)| f64::from(code) * f64::from(product + slope))
        .sum();
    let sum = desk.codes.iter().map(|&code| f64::from(code)).sum();
    ((f64::from(row[atom]) - made).max(0.0), sum)
}

/// New atoms from the residuals of a batch, best first, each with what it promises per row.
pub(crate) fn newcomers(slots: &[Slot], count: usize, penalty: f32) -> Vec<(f64, Vec<f32>)> {
    let Some((rests, fresh)) = residuals(slots) else {
        return Vec::new();
    };
    let n_rows = rests.n_rows();
    let mut products = Matrix::zeros(n_rows, n_rows);
    let side = Side::new(rests.all(), rests.stride());
    Panels::new(&fresh).correlate(side, n_rows, &mut products);
    let mut open = vec![true; n_rows];
    let mut found = Vec::new();
    while found.len() < count {
        let gain = |new: usize| -> f64 {
            let others = (0..n_rows).filter(|&row| row != new && open[row]);
            others
                .map(|row| 0.5 * f64::from((products.row(row)[new] - penalty).max(0.0)).powi(2))
                .sum()
        };
        let gains = (0..n_rows)
            .filter(|&new| open[new])
            .map(|new| (gain(new), new));
        let Some((best, new)) = gains.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))) else {
            break;
        };
        found.push((
            best / n_rows as f64,
            fresh.row(new)[..fresh.width()].to_vec(),
        ));
        open[new] = false;
        for (row, open) in open.iter_mut().enumerate() {
            *open &= products.row(row)[new] <= penalty;
        }
    }
    found
}

/// Residuals of a batch, and their positive parts at norm 1.
fn residuals(slots: &[Slot]) -> Option<(Matrix, Matrix)> {
    let rows: Vec<&[f32]> = slots
        .iter()
        .flat_map(|slot| (0..slot.n_rows()).map(|row| slot.rest(row)))
        .collect();
    let width = rows.first()?.len();
    let (mut rests, mut fresh) = (
        Matrix::zeros(rows.len(), width),
        Matrix::zeros(rows.len(), width),
    );
    for (at, row) in rows.iter().enumerate() {
        rests.row_mut(at).copy_from_slice(row);
        let out = fresh.row_mut(at);
        for (out, &rest) in out.iter_mut().zip(*row) {
            *out = rest.max(0.0);
        }
        to_norm_one(out);
    }
    Some((rests, fresh))
}

/// Pairs the least worthy atoms that may go with newcomers that promise more.
pub(crate) fn exchanges(
    worths: &[f64],
    may_go: impl Fn(usize) -> bool,
    promises: &[f64],
) -> Vec<usize> {
    let mut weakest: Vec<usize> = (0..worths.len()).filter(|&atom| may_go(atom)).collect();
    weakest.sort_by(|&a, &b| worths[a].total_cmp(&worths[b]).then(a.cmp(&b)));
    let pairs = weakest.into_iter().zip(promises);
    pairs
        .take_while(|&(atom, &promise)| promise > MARGIN * worths[atom])
        .map(|(atom, _)| atom)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::square::correlate::gram;

    #[test]
    fn sums_and_twins_are_worth_little() {
        // e1, e2, their sum at norm 1, e3, and e3 again.
        let half = 0.5_f32.sqrt();
        let flat = [
            1.0, 0.0, 0.0, 0.0, 1.0, 0.0, half, half, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0,
        ];
        let atoms = Matrix::from_flat(&flat, 3);
        let coder = Coder::new(gram(&atoms, &Panels::new(&atoms)), 0.5, 1e-4);
        let mut sums = Statistics::new(5, 3);
        sums.mass = 10.0;
        for atom in 0..5 {
            sums.second.row_mut(atom)[atom] = 10.0;
            sums.first[atom] = 10.0;
        }
        let worths = worths(&coder, &sums, &Pool::new(1).unwrap());
        // e1 by the others: sqrt(1/2) of the sum, at distance^2 1/2.
        assert!((worths[0] - 0.25).abs() < 1e-2, "{worths:?}");
        // The sum: exactly, by codes that sum to sqrt 2.
        assert!((worths[2] - 0.5 * (2.0_f64.sqrt() - 1.0)).abs() < 1e-2);
        assert!(worths[3].abs() < 1e-2 && worths[4].abs() < 1e-2);
        assert_eq!(exchanges(&worths, |atom| atom != 3, &[0.3, 0.01]), vec![4]);
    }
}
