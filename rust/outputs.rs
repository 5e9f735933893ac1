//! What experts put out, read once: norms, largest entries, and sums by channel.
#![expect(
    clippy::inline_always,
    reason = "only then are loops compiled for the processor found"
)]

use pulp::{Arch, Simd, WithSimd};

use crate::error::{Error, Result};
use crate::parallel::Pool;

/// Slots that one job reads where nothing is summed by channel.
const JOB: usize = 128;
/// Below this squares may have lost bits, or all, in float32.
const SMALLEST: f64 = 1e-30;
/// Independent sums of a reduction, so that it can be vectorised in a fixed order.
const LANES: usize = 32;

/// Outputs as the model holds them, (`n_slots`, `width`).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Values<'a> {
    Single(&'a [f32]),
    /// Upper halves of float32.
    Brain(&'a [u16]),
}

/// What is known of one slot.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Reading {
    /// Euclidean norm.
    pub norm: f32,
    /// Largest magnitude.
    pub peak: f32,
    /// The first channel that has it.
    pub channel: u32,
}

/// Slots in the order in which they are read, those of one site together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order<'a> {
    /// Numbers of slots.
    pub slots: &'a [i64],
    /// Where the slots of each site begin, (`n_sites` + 1).
    pub starts: &'a [i64],
}

/// Slots of one job, where their readings go, and the sums of their site: outputs, then squares.
struct Job<'a> {
    slots: &'a [i64],
    readings: &'a mut [Reading],
    sums: Option<&'a mut [f64]>,
}

/// Readings of the slots of an order, in that order; `sums`, (`n_sites`, 2, `width`), gain theirs.
///
/// # Errors
/// Arrays that do not fit together.
pub(crate) fn read(
    values: Values,
    width: usize,
    order: Order,
    sums: Option<&mut [f64]>,
    pool: &Pool,
) -> Result<Vec<Reading>> {
    check(values, width, order, sums.as_deref())?;
    let mut readings = vec![Reading::default(); order.slots.len()];
    let mut jobs = match sums {
        Some(sums) => by_site(order, &mut readings, sums, width),
        None => by_number(order, &mut readings),
    };
    pool.parts(&mut jobs, 1, |_, job| {
        Arch::new().dispatch(Run {
            job: &mut job[0],
            values,
            width,
        });
    });
    Ok(readings)
}

fn by_number<'a>(order: Order<'a>, readings: &'a mut [Reading]) -> Vec<Job<'a>> {
    let parts = order.slots.chunks(JOB).zip(readings.chunks_mut(JOB));
    let job = |(slots, readings)| Job {
        slots,
        readings,
        sums: None,
    };
    parts.map(job).collect()
}

fn by_site<'a>(
    order: Order<'a>,
    mut readings: &'a mut [Reading],
    sums: &'a mut [f64],
    width: usize,
) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for (bounds, sums) in order.starts.windows(2).zip(sums.chunks_mut(2 * width)) {
        let slots = &order.slots[bounds[0] as usize..bounds[1] as usize];
        let (own, rest) = readings.split_at_mut(slots.len());
        readings = rest;
        if !slots.is_empty() {
            jobs.push(Job {
                slots,
                readings: own,
                sums: Some(sums),
            });
        }
    }
    jobs
}

/// A job to be run with the best instructions that the processor has.
struct Run<'a, 'b> {
    job: &'a mut Job<'b>,
    values: Values<'a>,
    width: usize,
}

impl WithSimd for Run<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self { job, values, width } = self;
        let mut wide = vec![0.0_f32; width];
        for (reading, &slot) in job.readings.iter_mut().zip(job.slots) {
            let range = slot as usize * width..(slot as usize + 1) * width;
            let row = match values {
                Values::Single(values) => &values[range],
                Values::Brain(values) => {
                    for (wide, &half) in wide.iter_mut().zip(&values[range]) {
                        *wide = f32::from_bits(u32::from(half) << 16);
                    }
                    &wide
                }
            };
            *reading = look(row);
            if let Some(sums) = &mut job.sums {
                let (sum, square) = sums.split_at_mut(width);
                for ((sum, square), &value) in sum.iter_mut().zip(square).zip(row) {
                    let value = f64::from(value);
                    *sum += value;
                    *square += value * value;
                }
            }
        }
    }
}

#[inline(always)]
fn look(row: &[f32]) -> Reading {
    let (mut squares, mut peaks) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (lines, rest) = row.as_chunks::<LANES>();
    for line in lines {
        for lane in 0..LANES {
            squares[lane] = line[lane].mul_add(line[lane], squares[lane]);
            let size = line[lane].abs();
            peaks[lane] = if size > peaks[lane] {
                size
            } else {
                peaks[lane]
            };
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        squares[lane] += value * value;
        peaks[lane] = peaks[lane].max(value.abs());
    }
    let peak = peaks.into_iter().fold(0.0, f32::max);
    let mut square: f64 = squares.into_iter().map(f64::from).sum();
    if peak.is_finite() && (square < SMALLEST || !square.is_finite()) {
        // Squares that float32 does not hold.
        square = row.iter().map(|&value| f64::from(value).powi(2)).sum();
    }
    let channel = row.iter().position(|value| value.abs() >= peak);
    Reading {
        norm: square.sqrt() as f32,
        peak,
        channel: channel.unwrap_or(0) as u32,
    }
}

fn check(values: Values, width: usize, order: Order, sums: Option<&[f64]>) -> Result<()> {
    let n_values = match values {
        Values::Single(values) => values.len(),
        Values::Brain(values) => values.len(),
    };
    let n_slots = n_values.checked_div(width).unwrap_or(0);
    let length = |what, got, expected| {
        Err(Error::Length {
            what,
            got,
            expected,
        })
    };
    if width == 0 || n_values % width != 0 {
        return length("values", n_values, n_slots * width);
    }
    if let Some(position) = order
        .slots
        .iter()
        .position(|&slot| slot < 0 || slot as usize >= n_slots)
    {
        return Err(Error::Value {
            what: "slots",
            got: order.slots[position].to_string(),
            position,
            allowed: "numbers of slots",
        });
    }
    let Some(sums) = sums else { return Ok(()) };
    let n_sites = order.starts.len().saturating_sub(1);
    if sums.len() != n_sites * 2 * width {
        return length("sums", sums.len(), n_sites * 2 * width);
    }
    let falling = order.starts.windows(2).position(|pair| pair[1] < pair[0]);
    let ends = (order.starts.first(), order.starts.last());
    if falling.is_some() || ends != (Some(&0), Some(&(order.slots.len() as i64))) {
        return Err(Error::Value {
            what: "starts",
            got: format!("{:?}", ends.1),
            position: falling.unwrap_or(0),
            allowed: "rising from 0 to the number of slots",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool() -> Pool {
        Pool::new(2).unwrap()
    }

    #[test]
    fn two_slots_by_hand() {
        let values = [3.0, -4.0, 0.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0];
        let (slots, starts) = ([1, 0], [0, 0, 2]);
        let order = Order {
            slots: &slots,
            starts: &starts,
        };
        let mut sums = [0.0; 12];
        let found = read(Values::Single(&values), 3, order, Some(&mut sums), &pool()).unwrap();
        assert_eq!(
            (found[1].norm, found[1].peak, found[1].channel),
            (5.0, 4.0, 1)
        );
        assert_eq!((found[0].peak, found[0].channel), (9.0, 2));
        assert_eq!(sums[..6], [0.0; 6]);
        assert_eq!(sums[6..], [4.0, -3.0, 9.0, 10.0, 17.0, 81.0]);
    }

    #[test]
    fn huge_and_tiny_outputs_have_norms() {
        for (value, norm) in [(1e25_f32, 2e25), (1e-25, 2e-25), (0.0, 0.0)] {
            let order = Order {
                slots: &[0],
                starts: &[0, 1],
            };
            let found = read(Values::Single(&[value; 4]), 4, order, None, &pool()).unwrap();
            assert!((f64::from(found[0].norm) / norm - 1.0).abs() < 1e-6 || norm == 0.0);
            assert!(norm > 0.0 || found[0].norm == 0.0);
        }
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        let values = [0.0; 6];
        let refused = |slots: &[i64], starts: &[i64], n_sums: usize, width: usize| {
            let mut sums = vec![0.0; n_sums];
            let order = Order { slots, starts };
            read(
                Values::Single(&values),
                width,
                order,
                Some(&mut sums),
                &pool(),
            )
            .is_err()
        };
        assert!(!refused(&[0, 1], &[0, 2], 6, 3));
        assert!(refused(&[0, 2], &[0, 2], 6, 3));
        assert!(refused(&[-1], &[0, 1], 6, 3));
        assert!(refused(&[0, 1], &[0, 1], 6, 3));
        assert!(refused(&[0, 1], &[0, 2, 1], 12, 3));
        assert!(refused(&[0, 1], &[1, 2], 6, 3));
        assert!(refused(&[0], &[], 0, 3));
        assert!(refused(&[0], &[0, 1], 5, 3));
        assert!(refused(&[0], &[0, 1], 8, 4));
        assert!(refused(&[], &[0], 0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_one_value_at_a_time(n_slots in 1_usize..20, width in 1_usize..70, seed in 0_u64..99) {
            let mut rng = crate::rng::Rng::new(seed, 0, 0);
            let values: Vec<f32> = (0..n_slots * width).map(|_| rng.uniform() as f32 - 0.5).collect();
            let brain: Vec<u16> = values.iter().map(|value| (value.to_bits() >> 16) as u16).collect();
            let slots: Vec<i64> = (0..n_slots as i64).rev().collect();
            let starts = [0, n_slots as i64 / 2, n_slots as i64];
            let order = Order { slots: &slots, starts: &starts };
            for values_of in [Values::Single(&values), Values::Brain(&brain)] {
                let value = |at: usize| match values_of {
                    Values::Single(values) => values[at],
                    Values::Brain(values) => f32::from_bits(u32::from(values[at]) << 16),
                };
                let mut sums = vec![1.0; 4 * width];
                let found = read(values_of, width, order, Some(&mut sums), &pool()).unwrap();
                let alone = read(values_of, width, order, None, &pool()).unwrap();
                prop_assert_eq!(&found, &alone);
                let mut slow = vec![1.0_f64; 4 * width];
                for (place, &slot) in slots.iter().enumerate() {
                    let site = usize::from(place as i64 >= starts[1]);
                    let (mut square, mut peak, mut channel) = (0.0_f64, 0.0_f32, 0);
                    for at in 0..width {
                        let one = value(slot as usize * width + at);
                        square += f64::from(one).powi(2);
                        if one.abs() > peak {
                            (peak, channel) = (one.abs(), at as u32);
                        }
                        slow[site * 2 * width + at] += f64::from(one);
                        slow[(site * 2 + 1) * width + at] += f64::from(one).powi(2);
                    }
                    prop_assert!((f64::from(found[place].norm) - square.sqrt()).abs() < 1e-6);
                    prop_assert_eq!((found[place].peak, found[place].channel), (peak, channel));
                }
                for (sum, slow) in sums.iter().zip(&slow) {
                    prop_assert!((sum - slow).abs() < 1e-12);
                }
            }
        }
    }
}
