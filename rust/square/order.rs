//! The order in which rows are drawn: a new permutation for every pass over them.

use crate::rng::Rng;

/// Where the draw stands. Passes over other rows (the next piece of a stream) just go on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order {
    /// Passes begun before the present one.
    pub pass: u64,
    /// Rows of the present pass that have been drawn.
    pub place: usize,
    /// The present pass; empty when it must be drawn (again, after a pause).
    rows: Vec<u32>,
}

impl Order {
    /// An order that goes on where another stood.
    pub fn at(pass: u64, place: usize) -> Self {
        Self {
            pass,
            place,
            rows: Vec::new(),
        }
    }

    /// The next rows of `n`, at most `count` of them; fewer at the end of a pass.
    pub fn draw(&mut self, n: usize, count: usize, seed: u64) -> &[u32] {
        if self.place >= n {
            (self.pass, self.place) = (self.pass + 1, 0);
            self.rows.clear();
        }
        if self.rows.len() != n {
            self.rows = permutation(n, seed, self.pass);
        }
        let from = self.place;
        self.place = (from + count).min(n);
        &self.rows[from..self.place]
    }
}

/// Fisher and Yates's shuffle of 0..n.
fn permutation(n: usize, seed: u64, pass: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed, pass as usize, 1);
    let mut rows: Vec<u32> = (0..n as u32).collect();
    for last in (1..n).rev() {
        let other = ((rng.next() >> 32) * (last as u64 + 1)) >> 32;
        rows.swap(last, other as usize);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_draws_every_row_once() {
        let mut order = Order::default();
        let mut passes = Vec::new();
        for _ in 0..2 {
            let mut rows: Vec<u32> = (0..4).flat_map(|_| order.draw(10, 3, 7).to_vec()).collect();
            passes.push(rows.clone());
            rows.sort_unstable();
            assert_eq!(rows, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(passes[0], passes[1]);
        let mut resumed = Order::at(1, 3);
        assert_eq!(resumed.draw(10, 3, 7), &passes[1][3..6]);
    }
}
