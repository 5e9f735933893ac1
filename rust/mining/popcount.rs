//! Sizes of the intersections of bit rows, with the widest instructions the processor has.
//!
//! The loops are plain Rust that the compiler turns into vector instructions; a build may not
//! assume them, so the same body is compiled three times and chosen when the program runs.

#![allow(
    unsafe_code,
    reason = "calling a function compiled for a processor feature, after looking for the feature"
)]

/// Sites of one tile: rows of the left side.
pub(super) const TILE: usize = 16;
/// Words read at a time; rows are padded to a multiple.
pub(super) const LANES: usize = 8;
const LEFT: usize = 2;
const RIGHT: usize = 4;

/// Adds |left ∩ right| for `TILE` rows on the left and a multiple of 4 on the right.
///
/// Rows have `width` words, a multiple of 8; `counts` has a row of `right` counts for each on the
/// left.
pub(super) fn add_intersections(left: &[u64], right: &[u64], width: usize, counts: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vpopcntdq") {
            // SAFETY: both features have just been found.
            return unsafe { wide(left, right, width, counts) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt") {
            // SAFETY: both features have just been found.
            return unsafe { medium(left, right, width, counts) };
        }
    }
    body(left, right, width, counts);
}

/// Nanoseconds per word of a pair on a processor of this kind; only for choosing a method.
pub(super) fn cost() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vpopcntdq") {
        return 0.07;
    }
    0.3
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vpopcntdq")]
fn wide(left: &[u64], right: &[u64], width: usize, counts: &mut [u32]) {
    body(left, right, width, counts);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
fn medium(left: &[u64], right: &[u64], width: usize, counts: &mut [u32]) {
    body(left, right, width, counts);
}

#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "the body must take on the features of its caller"
)]
fn body(left: &[u64], right: &[u64], width: usize, counts: &mut [u32]) {
    let n_right = right.len() / width;
    for (group, rights) in right.chunks_exact(RIGHT * width).enumerate() {
        for (pair, lefts) in left.chunks_exact(LEFT * width).enumerate() {
            let found = block(lefts, rights, width);
            for (l, row) in found.iter().enumerate() {
                let at = (pair * LEFT + l) * n_right + group * RIGHT;
                for (count, more) in counts[at..at + RIGHT].iter_mut().zip(row) {
                    *count += more;
                }
            }
        }
    }
}

/// Intersections of 2 rows with 4, kept in registers.
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "the body must take on the features of its caller"
)]
fn block(left: &[u64], right: &[u64], width: usize) -> [[u32; RIGHT]; LEFT] {
    let (l0, l1) = left.split_at(width);
    let (r01, r23) = right.split_at(2 * width);
    let ((r0, r1), (r2, r3)) = (r01.split_at(width), r23.split_at(width));
    let mut sums = [[[0_u64; LANES]; RIGHT]; LEFT];
    let chunks = l0
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(l1.as_chunks::<LANES>().0);
    let chunks = chunks
        .zip(r0.as_chunks::<LANES>().0)
        .zip(r1.as_chunks::<LANES>().0);
    let chunks = chunks
        .zip(r2.as_chunks::<LANES>().0)
        .zip(r3.as_chunks::<LANES>().0);
    for (((((a, b), w), x), y), z) in chunks {
        for (l, own) in [a, b].into_iter().enumerate() {
            for (r, other) in [w, x, y, z].into_iter().enumerate() {
                for lane in 0..LANES {
                    sums[l][r][lane] += u64::from((own[lane] & other[lane]).count_ones());
                }
            }
        }
    }
    sums.map(|row| row.map(|lanes| lanes.iter().sum::<u64>() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    type Add<'a> = &'a dyn Fn(&[u64], &[u64], usize, &mut [u32]);

    #[test]
    fn every_build_of_the_loop_counts_the_same() {
        let mut rng = Rng::new(5, 0, 0);
        let width = 2 * LANES;
        let words: Vec<u64> = (0..TILE * width).map(|_| rng.next()).collect();
        let mut expected = Vec::new();
        for left in words.chunks(width) {
            for right in words.chunks(width) {
                let both = left.iter().zip(right).map(|(l, r)| (l & r).count_ones());
                expected.push(both.sum::<u32>());
            }
        }
        let check = |add: Add| {
            let mut counts = vec![0; TILE * TILE];
            add(&words, &words, width, &mut counts);
            assert_eq!(counts, expected);
        };
        check(&body);
        check(&add_intersections);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt") {
            // SAFETY: both features have just been found.
            check(&|l, r, w, c| unsafe { medium(l, r, w, c) });
        }
    }
}
