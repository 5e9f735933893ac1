//! One seed, independent streams by level and purpose (`SplitMix64`).

/// A small deterministic generator.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of a seed for one level and round.
    pub fn new(seed: u64, level: usize, round: usize) -> Self {
        let mut rng = Self(seed);
        rng.0 = rng.next() ^ (level as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        rng.0 = rng.next() ^ (round as u64).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        rng
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// An index drawn in proportion to cumulative weights (ascending, last above 0).
    pub fn draw(&mut self, cumulative: &[f64]) -> usize {
        let total = cumulative[cumulative.len() - 1];
        let at = self.uniform() * total;
        cumulative
            .partition_point(|&sum| sum <= at)
            .min(cumulative.len() - 1)
    }

    /// `count` distinct indices below `n`, ascending.
    pub fn distinct(&mut self, n: usize, count: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        let count = count.min(n);
        for at in 0..count {
            let other = at + (self.next() % (n - at) as u64) as usize;
            all.swap(at, other);
        }
        all.truncate(count);
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_and_repeat() {
        let first = Rng::new(1, 0, 0).next();
        assert_eq!(first, Rng::new(1, 0, 0).next());
        assert!(
            [(2, 0, 0), (1, 1, 0), (1, 0, 1)]
                .iter()
                .all(|&(s, l, r)| { Rng::new(s, l, r).next() != first })
        );
    }

    #[test]
    fn draws_only_where_weight_is() {
        let mut rng = Rng::new(3, 0, 0);
        let cumulative = [0.0, 1.0, 1.0, 3.0];
        let mut seen = [0; 4];
        for _ in 0..3000 {
            seen[rng.draw(&cumulative)] += 1;
        }
        assert_eq!((seen[0], seen[2]), (0, 0));
        assert!((900..1100).contains(&seen[1]));
    }
}
