//! How far a row's codes are from the best: the duality gap of the non-negative lasso, in float64.

use crate::square::matrix::Matrix;

/// Scratch memory: one residual.
pub(crate) struct Gap {
    residual: Vec<f64>,
}

impl Gap {
    /// Scratch memory for rows of `n_sites`.
    pub fn new(n_sites: usize) -> Self {
        Self {
            residual: vec![0.0; n_sites],
        }
    }

    /// The gap of one row: `penalty sum r + 1/2 |e|^2 - (s <e, x> - s^2/2 |e|^2)` with the residual
    /// e and the largest s <= 1 for which `s <e, d_i>` is at most the penalty for every atom.
    ///
    /// Holds without caps only (a cap is one more constraint, so the optimum may be higher).
    pub fn of(
        &mut self,
        (sites, values): (&[u32], &[f32]),
        atoms: &Matrix,
        codes: &[f32],
        penalty: f32,
    ) -> f64 {
        self.residual.fill(0.0);
        for (&site, &value) in sites.iter().zip(values) {
            self.residual[site as usize] = f64::from(value);
        }
        for (atom, &code) in codes.iter().enumerate().filter(|(_, code)| **code > 0.0) {
            for (rest, &value) in self.residual.iter_mut().zip(atoms.row(atom)) {
                *rest -= f64::from(code) * f64::from(value);
            }
        }
        let penalty = f64::from(penalty);
        let error: f64 = self.residual.iter().map(|rest| rest * rest).sum();
        let steepest = (0..atoms.n_rows()).map(|atom| self.product(atoms.row(atom)));
        let steepest = steepest.fold(0.0, f64::max);
        let scale = if steepest > penalty {
            penalty / steepest
        } else {
            1.0
        };
        let entries = sites.iter().zip(values);
        let inner: f64 = entries
            .map(|(&s, &x)| self.residual[s as usize] * f64::from(x))
            .sum();
        let sum: f64 = codes.iter().map(|&code| f64::from(code)).sum();
        let dual = scale * inner - 0.5 * scale * scale * error;
        penalty * sum + 0.5 * error - dual
    }

    fn product(&self, atom: &[f32]) -> f64 {
        let pairs = self.residual.iter().zip(atom);
        pairs.map(|(rest, &value)| rest * f64::from(value)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_atom_by_hand() {
        // d = (1, 0), x = (2, 0), penalty 0.5: the optimum is r = 1.5, at r = 1 the cost is
        // 0.5 + 0.5 = 1 and the best 0.875; the dual point s = 0.5 gives 1 - 0.125 = 0.875.
        let atoms = Matrix::from_flat(&[1.0, 0.0], 2);
        let row: (&[u32], &[f32]) = (&[0], &[2.0]);
        let mut gap = Gap::new(2);
        assert!((gap.of(row, &atoms, &[1.0], 0.5) - 0.125).abs() < 1e-12);
        assert!(gap.of(row, &atoms, &[1.5], 0.5).abs() < 1e-12);
    }
}
