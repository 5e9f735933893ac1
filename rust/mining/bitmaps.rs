//! One bit row per site, cut into blocks of rows that stay in the cache.

use super::baskets::Baskets;
use super::popcount::{LANES, TILE, add_intersections};

/// Words of a block: 8,192 rows, so that a tile of sites takes 16 KB.
const BLOCK: usize = 128;

/// Which rows hold each site, as bits; sites are padded to whole tiles with empty ones.
///
/// Block by block, within a block site by site, so that a tile reads memory in order.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    words: Vec<u64>,
    n_words: usize,
    n_padded: usize,
}

impl Bitmaps {
    /// Takes up other rows and keeps the memory.
    pub fn fill(&mut self, baskets: &Baskets) {
        let rows = (0..baskets.len()).map(|row| baskets.row(row).iter().copied());
        self.fill_from(baskets.len(), baskets.n_sites(), rows);
    }

    /// Takes up so many rows over so many sites.
    pub fn fill_from(
        &mut self,
        n_rows: usize,
        n_sites: usize,
        rows: impl Iterator<Item = impl Iterator<Item = u32>>,
    ) {
        self.n_words = n_rows.div_ceil(64).next_multiple_of(LANES);
        self.n_padded = n_sites.next_multiple_of(TILE);
        self.words.clear();
        self.words.resize(self.n_words * self.n_padded, 0);
        // One word of every site side by side: the places it goes to share few cache sets.
        let mut word = vec![0_u64; n_sites];
        for (row, sites) in rows.enumerate() {
            for site in sites {
                word[site as usize] |= 1 << (row % 64);
            }
            if row % 64 == 63 || row + 1 == n_rows {
                self.put(row / 64, &mut word);
            }
        }
    }

    /// Moves one word of every site to its place.
    fn put(&mut self, at: usize, word: &mut [u64]) {
        let (block, inside) = (at / BLOCK, at % BLOCK);
        let (first, width) = (block * BLOCK * self.n_padded + inside, self.width(block));
        let places = self.words[first..].iter_mut().step_by(width);
        for (place, bits) in places.zip(word) {
            *place = std::mem::take(bits);
        }
    }

    /// Words of a block: all but the last are full.
    fn width(&self, block: usize) -> usize {
        BLOCK.min(self.n_words - block * BLOCK)
    }

    /// Counts of the tile's sites with every site from its first on: (TILE, rest) row by row.
    pub fn tile(&self, tile: usize, counts: &mut Vec<u32>) {
        let rest = self.n_padded - tile * TILE;
        counts.clear();
        counts.resize(TILE * rest, 0);
        for block in 0..self.n_words.div_ceil(BLOCK) {
            let width = self.width(block);
            let start = block * BLOCK * self.n_padded;
            let right = &self.words[start + tile * TILE * width..start + self.n_padded * width];
            add_intersections(&right[..TILE * width], right, width, counts);
        }
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
        let first = block * BLOCK * self.n_padded + inside;
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
