//! Atoms that others can stand in for are taken out, if that lowers the objective.
//!
//! Block steps shrink such atoms only little by little: while two atoms share the same rows, each
//! cap looks right given the other.

use crate::parallel::Pool;
use crate::square::coder::{Coder, Desk};
use crate::square::correlate::gram;
use crate::square::level::Level;
use crate::square::panels::Panels;
use crate::square::replace::{alone, worth};

/// One in this many atoms may go at once.
const AT_ONCE: usize = 8;

impl Level<'_> {
    /// Tries to do without atoms that cost more in dictionary size than they are worth in the rows;
    /// what turns out to raise the objective is not done. True if something was.
    pub fn drop_weak(&mut self, pool: &Pool) -> bool {
        let mut weak = self.weak();
        while !weak.is_empty() {
            let mut without = self.clone();
            without.take_out(&weak, pool);
            if without.terms.total < self.terms.total {
                *self = without;
                return true;
            }
            weak.truncate(weak.len() / 2);
        }
        false
    }

    /// Atoms that seem not to pay, the most certain first; none that stands in for another one.
    fn weak(&self) -> Vec<usize> {
        let gram = gram(&self.atoms, &Panels::new(&self.atoms));
        let mut coder = Coder::new(gram, 0.0, 1e-3);
        let mut desk = Desk::new(coder.n_atoms());
        let penalty = self.weights.sparsity / self.weights.reconstruction;
        let total: f64 = self.row_weights.iter().sum();
        let scale = self.weights.reconstruction * total;
        let mut loss = |coder: &Coder, atom: usize| {
            let stand_in = alone(coder, &mut desk, atom);
            let size = self.weights.size * f64::from(self.peaks[atom]);
            scale * worth(stand_in, &self.sums, atom, penalty) - size
        };
        let live = (0..coder.n_atoms()).filter(|&atom| self.peaks[atom] > 0.0);
        let mut losses: Vec<(f64, usize)> = live.map(|atom| (loss(&coder, atom), atom)).collect();
        losses.retain(|pair| pair.0 < 0.0);
        losses.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut weak = Vec::new();
        for (_, atom) in losses {
            if weak.len() < self.peaks.len().div_ceil(AT_ONCE) && loss(&coder, atom) < 0.0 {
                coder.bar(atom);
                weak.push(atom);
            }
        }
        weak
    }

    /// Codes all rows without some atoms, the others free of their caps.
    fn take_out(&mut self, which: &[usize], pool: &Pool) {
        for &atom in which {
            self.atoms.row_mut(atom).fill(0.0);
        }
        for (&atom, value) in self.codes.atoms.iter().zip(&mut self.codes.values) {
            if which.contains(&(atom as usize)) {
                *value = 0.0;
            }
        }
        self.peaks.fill(f32::INFINITY);
        self.recode(pool);
        self.sum_up(pool);
    }
}
