//! Lists of the rows that hold each site, out of the rows' bits.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::adder::{GROUP, Line, SITES, WORDS};

/// Words between two columns beyond their length: their starts share few cache sets.
const APART: usize = 8;

/// For each site the rows that hold it, filled up to whole groups with one row that holds none.
#[derive(Debug, Default)]
pub(super) struct Columns {
    lists: Vec<[u16; GROUP]>,
    starts: Vec<u32>,
    /// Bits of each place, one column after the other; scratch memory.
    bits: Vec<u64>,
}

impl Columns {
    /// Takes up other rows; `lines` are all lines of the first 512 places, then of the next.
    ///
    /// The last line of each is empty and fills up the lists. Places before `first` have no list.
    pub fn fill(&mut self, lines: &[Line], n_lines: usize, first: usize, n_entries: usize) {
        Arch::new().dispatch(Fill {
            columns: self,
            lines,
            n_lines,
            first,
            n_entries,
        });
    }

    /// Rows that hold the site.
    pub fn list(&self, site: usize) -> &[[u16; GROUP]] {
        &self.lists[self.starts[site] as usize..self.starts[site + 1] as usize]
    }
}

pub(super) struct Fill<'a> {
    pub columns: &'a mut Columns,
    pub lines: &'a [Line],
    pub n_lines: usize,
    pub first: usize,
    pub n_entries: usize,
}

impl WithSimd for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let empty = self.n_lines - 1;
        let n_places = self.lines.len() / self.n_lines * SITES;
        let width = empty.div_ceil(64) + APART;
        let Columns { bits, .. } = &mut *self.columns;
        bits.resize(n_places * width, 0);
        for (chunk, lines) in self.lines.chunks_exact(self.n_lines).enumerate() {
            for (at, rows) in lines[..empty].chunks(64).enumerate() {
                turn(rows, &mut bits[chunk * SITES * width + at..], width);
            }
        }
        let most = self.n_entries + (n_places - self.first + 1) * GROUP;
        let groups = most.div_ceil(GROUP);
        self.columns.lists.resize(groups, [0; GROUP]);
        self.columns.read(self.first..n_places, empty);
    }
}

impl Columns {
    /// Lists of the ones of these columns, filled up with `empty`, the number of rows.
    #[inline(always)]
    fn read(&mut self, places: Range<usize>, empty: usize) {
        let n_words = empty.div_ceil(64);
        let width = n_words + APART;
        let lists = self.lists.as_flattened_mut();
        let mut end = 0;
        self.starts.clear();
        self.starts.push(0);
        for place in places {
            let start = end;
            let column = &self.bits[place * width..][..n_words];
            for (at, &word) in column.iter().enumerate() {
                end = ones(word, (at * 64) as u16, lists, end);
            }
            let full = start + (end - start).next_multiple_of(GROUP);
            lists[end..full].fill(empty as u16);
            end = full;
            self.starts.push((end / GROUP) as u32);
        }
    }
}

/// Writes the places of a word's ones; gives the end. Writes eight at a time, so up to 7 beyond.
#[inline(always)]
fn ones(mut word: u64, first: u16, out: &mut [u16], start: usize) -> usize {
    let end = start + word.count_ones() as usize;
    for at in (start..end).step_by(8) {
        for place in &mut out[at..at + 8] {
            *place = first + word.trailing_zeros() as u16;
            word &= word.wrapping_sub(1);
        }
    }
    end
}

/// Columns of up to 64 lines: one word of each, `width` words apart.
#[inline(always)]
fn turn(rows: &[Line], out: &mut [u64], width: usize) {
    let mut square = [Line::default(); 64];
    square[..rows.len()].copy_from_slice(rows);
    swap::<32>(&mut square, 0x0000_0000_FFFF_FFFF);
    swap::<16>(&mut square, 0x0000_FFFF_0000_FFFF);
    swap::<8>(&mut square, 0x00FF_00FF_00FF_00FF);
    swap::<4>(&mut square, 0x0F0F_0F0F_0F0F_0F0F);
    swap::<2>(&mut square, 0x3333_3333_3333_3333);
    swap::<1>(&mut square, 0x5555_5555_5555_5555);
    for word in 0..WORDS {
        for (bit, line) in square.iter().enumerate() {
            out[(word * 64 + bit) * width] = line.0[word];
        }
    }
}

/// Exchanges the off-diagonal quarters of every square of 2 × `SIZE` rows and bits.
#[inline(always)]
fn swap<const SIZE: usize>(square: &mut [Line; 64], mask: u64) {
    for rows in square.chunks_exact_mut(2 * SIZE) {
        let (upper, lower) = rows.split_at_mut(SIZE);
        for (upper, lower) in upper.iter_mut().zip(lower) {
            for word in 0..WORDS {
                let differ = (upper.0[word] >> SIZE ^ lower.0[word]) & mask;
                lower.0[word] ^= differ;
                upper.0[word] ^= differ << SIZE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::adder::tests::on_all;
    use super::*;
    use crate::rng::Rng;

    /// A `Fill` that keeps its lists.
    struct Filled<'a>(&'a [Line], usize, usize, usize);

    impl WithSimd for Filled<'_> {
        type Output = Columns;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Columns {
            let mut columns = Columns::default();
            let fill = Fill {
                columns: &mut columns,
                lines: self.0,
                n_lines: self.1,
                first: self.2,
                n_entries: self.3,
            };
            fill.with_simd(simd);
            columns
        }
    }

    #[test]
    fn lists_hold_the_rows_of_each_site() {
        let mut rng = Rng::new(3, 0, 0);
        for (n_rows, n_chunks, first) in [(0, 1, 511), (1, 1, 0), (64, 2, 3), (130, 2, 500)] {
            let n_lines = n_rows + 1;
            let mut lines = vec![Line::default(); n_chunks * n_lines];
            let mut expected = vec![Vec::new(); n_chunks * SITES - first];
            for row in 0..n_rows {
                for place in first..n_chunks * SITES {
                    if rng.next().is_multiple_of(3) {
                        let line = &mut lines[place / SITES * n_lines + row];
                        line.0[place % SITES / 64] |= 1 << (place % 64);
                        expected[place - first].push(row as u16);
                    }
                }
            }
            let n_entries = expected.iter().map(Vec::len).sum();
            on_all(
                || Filled(&lines, n_lines, first, n_entries),
                |columns| {
                    for (site, rows) in expected.iter().enumerate() {
                        let list = columns.list(site).as_flattened();
                        assert_eq!(list.len(), rows.len().next_multiple_of(GROUP));
                        assert_eq!(&list[..rows.len()], rows);
                        assert!(list[rows.len()..].iter().all(|&row| row as usize == n_rows));
                    }
                },
            );
        }
    }
}
