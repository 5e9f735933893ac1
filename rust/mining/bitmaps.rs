//! One bit row per site, cut into blocks of rows that stay in the cache.

use super::baskets::Baskets;

/// Words of a block: 8,192 rows.
const BLOCK: usize = 128;

/// Which rows hold each site, as bits: block by block, within a block site by site.
#[derive(Debug)]
pub(super) struct Bitmaps {
    words: Vec<u64>,
    n_words: usize,
    n_sites: usize,
}

impl Bitmaps {
    /// The bits of these rows.
    pub fn new(baskets: &Baskets) -> Self {
        let (n_rows, n_sites) = (baskets.len(), baskets.n_sites());
        let n_words = n_rows.div_ceil(64);
        let mut out = Self {
            words: vec![0; n_words * n_sites],
            n_words,
            n_sites,
        };
        // One word of every site side by side: the places it goes to share few cache sets.
        let mut word = vec![0_u64; n_sites];
        for row in 0..n_rows {
            for &site in baskets.row(row) {
                word[site as usize] |= 1 << (row % 64);
            }
            if row % 64 == 63 || row + 1 == n_rows {
                out.put(row / 64, &mut word);
            }
        }
        out
    }

    /// Moves one word of every site to its place.
    fn put(&mut self, at: usize, word: &mut [u64]) {
        let (block, inside) = (at / BLOCK, at % BLOCK);
        let (first, width) = (block * BLOCK * self.n_sites + inside, self.width(block));
        let places = self.words[first..].iter_mut().step_by(width);
        for (place, bits) in places.zip(word) {
            *place = std::mem::take(bits);
        }
    }

    /// Words of a block: all but the last are full.
    fn width(&self, block: usize) -> usize {
        BLOCK.min(self.n_words - block * BLOCK)
    }

    /// Rows that hold a site, ascending.
    pub fn rows(&self, site: usize) -> impl Iterator<Item = usize> {
        (0..self.n_words).flat_map(move |at| {
            let word = self.word(at, site);
            ones(word).map(move |bit| at * 64 + bit)
        })
    }

    /// First row of every word, and the rows of it that hold all these sites, as bits.
    pub fn common(&self, sites: &[u32]) -> impl Iterator<Item = (usize, u64)> {
        (0..self.n_words).map(move |at| {
            let words = sites.iter().map(|&site| self.word(at, site as usize));
            (at * 64, words.fold(u64::MAX, |all, word| all & word))
        })
    }

    fn word(&self, at: usize, site: usize) -> u64 {
        let (block, inside) = (at / BLOCK, at % BLOCK);
        let first = block * BLOCK * self.n_sites + inside;
        self.words[first + site * self.width(block)]
    }
}

/// Places of the ones in a word.
pub(super) fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros() as usize;
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}
