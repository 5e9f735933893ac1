//! Sums of bit rows by carry-save adders: in how many of the listed rows each site is active.
//!
//! A full adder takes three bits of one weight to one of that weight and one of the next, for 512
//! sites at a time; sixteen rows leave one carry, and carries wait in pairs like the digits of a
//! binary counter (Harley and Seal's population count, upright). Rows are read once for each first
//! site that they hold, so that the work follows the active sites, not all pairs of sites.

use pulp::{Arch, Simd, WithSimd};

/// Sites of a line.
pub(super) const SITES: usize = 512;
/// Words of a line.
pub(super) const WORDS: usize = SITES / 64;
/// Rows added at a time; lists are filled up to a multiple with a row without sites.
pub(super) const GROUP: usize = 16;
/// Digits of a sum: less than 65,536 rows are added at once.
const PLANES: usize = 16;
/// Digits that are added up within a group.
const LOW: usize = GROUP.ilog2() as usize;

/// Which of 512 sites are active in one row, as bits: one line of the cache.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Line(pub [u64; WORDS]);

/// Adds to counts in how many of the listed rows each site is active.
///
/// `lines` are those of all rows; `counts` belong to the last sites of a line, whole words of 64.
pub(super) fn add(list: &[[u16; GROUP]], lines: &[Line], counts: &mut [u32]) {
    Arch::new().dispatch(Add {
        list,
        lines,
        counts,
    });
}

pub(super) struct Add<'a> {
    pub list: &'a [[u16; GROUP]],
    pub lines: &'a [Line],
    pub counts: &'a mut [u32],
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut planes = [Line::default(); PLANES];
        for part in 0..WORDS / S::U64_LANES {
            sum(simd, self.list, self.lines, part, &mut planes);
        }
        let digits = usize::BITS - (self.list.len() * GROUP).leading_zeros();
        let first = WORDS - self.counts.len() / 64;
        let words = self.counts.as_chunks_mut::<64>().0.iter_mut();
        for (at, counts) in words.enumerate() {
            unpack(simd, &planes[..digits as usize], first + at, counts);
        }
    }
}

/// Digits of the sums of one vector's sites: bit planes, lowest first.
#[inline(always)]
fn sum<S: Simd>(
    simd: S,
    list: &[[u16; GROUP]],
    lines: &[Line],
    part: usize,
    planes: &mut [Line; PLANES],
) {
    let zero = simd.splat_u64s(0);
    let mut low = [zero; LOW];
    let mut sums = [zero; PLANES - LOW];
    let mut waiting = sums;
    for (at, rows) in list.iter().enumerate() {
        let mut carry = group(simd, &mut low, rows, lines, part);
        // A digit whose bit of `at` is set has a carry waiting: two make one of the next.
        let taken = (at.trailing_ones() as usize).min(PLANES - LOW - 1);
        for digit in 0..taken {
            (sums[digit], carry) = full_add(simd, sums[digit], waiting[digit], carry);
        }
        waiting[taken] = carry;
    }
    let mut carry = zero;
    for digit in 0..PLANES - LOW {
        if list.len() >> digit & 1 == 0 {
            waiting[digit] = zero;
        }
        (sums[digit], carry) = full_add(simd, sums[digit], waiting[digit], carry);
    }
    for (plane, bits) in planes.iter_mut().zip(low.into_iter().chain(sums)) {
        S::as_mut_simd_u64s(&mut plane.0).0[part] = bits;
    }
}

/// Adds sixteen rows to the low digits; gives what they carry.
#[inline(always)]
fn group<S: Simd>(
    simd: S,
    low: &mut [S::u64s; LOW],
    rows: &[u16; GROUP],
    lines: &[Line],
    part: usize,
) -> S::u64s {
    let mut carries = [simd.splat_u64s(0); GROUP / 2];
    for (carry, pair) in carries.iter_mut().zip(rows.as_chunks::<2>().0) {
        let [one, two] = pair.map(|row| S::as_simd_u64s(&lines[row as usize].0).0[part]);
        (low[0], *carry) = full_add(simd, low[0], one, two);
    }
    for (digit, sum) in low.iter_mut().enumerate().skip(1) {
        for at in 0..GROUP >> (digit + 1) {
            let (one, two) = (carries[2 * at], carries[2 * at + 1]);
            (*sum, carries[at]) = full_add(simd, *sum, one, two);
        }
    }
    carries[0]
}

/// Sum and carry of three bits; written so that each becomes one three-way instruction.
#[inline(always)]
fn full_add<S: Simd>(simd: S, a: S::u64s, b: S::u64s, c: S::u64s) -> (S::u64s, S::u64s) {
    let sum = simd.xor_u64s(simd.xor_u64s(a, b), c);
    let either = simd.or_u64s(a, b);
    let carry = simd.or_u64s(simd.and_u64s(a, b), simd.and_u64s(either, c));
    (sum, carry)
}

const BITS: [u32; 32] = {
    let mut bits = [0; 32];
    let mut at = 0;
    while at < 32 {
        bits[at] = 1 << at;
        at += 1;
    }
    bits
};

/// Adds the sums of the 64 sites of one word to their counts.
#[inline(always)]
fn unpack<S: Simd>(simd: S, planes: &[Line], word: usize, counts: &mut [u32; 64]) {
    let bits = S::as_simd_u32s(&BITS).0;
    let zero = simd.splat_u32s(0);
    for (half, counts) in counts.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (own, &bit) in S::as_mut_simd_u32s(counts).0.iter_mut().zip(bits) {
            let mut sum = *own;
            for (digit, plane) in planes.iter().enumerate() {
                let all = simd.splat_u32s((plane.0[word] >> (32 * half)) as u32);
                let has = simd.equal_u32s(simd.and_u32s(all, bit), bit);
                let more = simd.splat_u32s(1 << digit);
                sum = simd.add_u32s(sum, simd.select_u32s(has, more, zero));
            }
            *own = sum;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Runs the work with every instruction set that this processor has.
    pub fn on_all<W: WithSimd>(make: impl Fn() -> W, mut check: impl FnMut(W::Output)) {
        check(make().with_simd(pulp::Scalar));
        check(Arch::new().dispatch(make()));
        #[cfg(target_arch = "x86_64")]
        {
            use pulp::x86::{V3, V4};
            if let Some(v3) = V3::try_new() {
                check(Simd::vectorize(v3, make()));
            }
            if let Some(v4) = V4::try_new() {
                check(Simd::vectorize(v4, make()));
            }
        }
    }

    /// An `Add` that keeps its counts.
    struct Counted<'a>(&'a [[u16; GROUP]], &'a [Line], usize);

    impl WithSimd for Counted<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let mut counts = vec![7; self.2];
            let (list, lines) = (self.0, self.1);
            let add = Add {
                list,
                lines,
                counts: &mut counts,
            };
            add.with_simd(simd);
            counts
        }
    }

    #[test]
    fn three_rows_by_hand() {
        let mut lines = [Line::default(); 3];
        lines[0].0[7] = 0b011;
        lines[1].0[7] = 0b110;
        let mut lists = [[2; GROUP]];
        lists[0][..3].copy_from_slice(&[0, 1, 0]);
        on_all(
            || Counted(&lists, &lines, 64),
            |counts| {
                assert_eq!(counts[..4], [7 + 2, 7 + 3, 7 + 1, 7]);
            },
        );
    }

    #[test]
    fn every_instruction_set_adds_as_one_by_one() {
        let mut rng = Rng::new(5, 0, 0);
        let mut lines: Vec<Line> = (0..99)
            .map(|_| Line([(); WORDS].map(|()| rng.next())))
            .collect();
        lines[50] = Line([u64::MAX; WORDS]);
        for (groups, n) in [(0, 512), (1, 512), (2, 64), (15, 128), (16, 512), (33, 448)] {
            let list: Vec<[u16; GROUP]> = (0..groups)
                .map(|_| [(); GROUP].map(|()| (rng.next() % 99) as u16))
                .collect();
            let mut expected = vec![7; n];
            for line in list.iter().flatten().map(|&row| lines[row as usize]) {
                for (at, count) in expected.iter_mut().enumerate() {
                    let place = SITES - n + at;
                    *count += (line.0[place / 64] >> (place % 64) & 1) as u32;
                }
            }
            on_all(
                || Counted(&list, &lines, n),
                |counts| assert_eq!(counts, expected),
            );
        }
    }

    #[test]
    fn the_last_digit_does_not_run_over() {
        let lines = [Line([u64::MAX; WORDS])];
        for groups in [16, 512, 2047, 2048, 4095] {
            let list = vec![[0; GROUP]; groups];
            let expected = vec![7 + (groups * GROUP) as u32; 512];
            on_all(
                || Counted(&list, &lines, 512),
                |counts| assert_eq!(counts, expected),
            );
        }
    }
}
