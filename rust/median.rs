//! Weighted quantiles: the exact minimiser of a convex piecewise-linear function of one variable.

use std::cmp::Ordering;

/// A breakpoint and how much the slope rises there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub at: f32,
    pub weight: f32,
}

/// The smallest breakpoint up to which the weights sum to at least `target`; infinity if none.
///
/// Quickselect with three-way partition; the order of `points` changes, and the sums only depend
/// on the order given.
pub(crate) fn quantile(points: &mut [Point], target: f64) -> f32 {
    let (mut low, mut high, mut below) = (0, points.len(), 0.0);
    while high - low > 16 {
        let pivot = middle(
            points[low].at,
            points[low + (high - low) / 2].at,
            points[high - 1].at,
        );
        let (first, last) = partition(&mut points[low..high], pivot);
        let (first, last) = (low + first, low + last);
        let under = below + weight(&points[low..first]);
        if under >= target && first > low {
            high = first;
            continue;
        }
        let upto = under + weight(&points[first..last]);
        if upto >= target {
            return pivot;
        }
        (low, below) = (last, upto);
    }
    scan(&mut points[low..high], target - below)
}

fn scan(points: &mut [Point], target: f64) -> f32 {
    points.sort_unstable_by(|a, b| a.at.total_cmp(&b.at));
    let mut sum = 0.0;
    for point in points {
        sum += f64::from(point.weight);
        if sum >= target {
            return point.at;
        }
    }
    f32::INFINITY
}

fn weight(points: &[Point]) -> f64 {
    points.iter().map(|point| f64::from(point.weight)).sum()
}

fn middle(a: f32, b: f32, c: f32) -> f32 {
    a.max(b).min(a.min(b).max(c))
}

/// Moves smaller ones to the front and larger ones to the back; returns where equals begin and end.
fn partition(points: &mut [Point], pivot: f32) -> (usize, usize) {
    let (mut first, mut at, mut last) = (0, 0, points.len());
    while at < last {
        match points[at].at.total_cmp(&pivot) {
            Ordering::Less => {
                points.swap(first, at);
                first += 1;
                at += 1;
            }
            Ordering::Greater => {
                last -= 1;
                points.swap(at, last);
            }
            Ordering::Equal => at += 1,
        }
    }
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Slow twin: minimise `sum w |t - r|` over the breakpoints themselves.
    fn brute(points: &[Point]) -> f64 {
        let cost = |r: f32| -> f64 {
            let each = |p: &Point| f64::from(p.weight) * (f64::from(p.at) - f64::from(r)).abs();
            points.iter().map(each).sum()
        };
        points
            .iter()
            .map(|point| cost(point.at))
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn half_the_weight_minimises_absolute_deviation(
            pairs in prop::collection::vec((-8_i8..8, 1_u8..9), 1..80)
        ) {
            let mut points: Vec<Point> = pairs.iter()
                .map(|&(at, w)| Point { at: f32::from(at) / 4.0, weight: f32::from(w) }).collect();
            let best = brute(&points);
            let r = quantile(&mut points.clone(), weight(&points) / 2.0);
            let cost: f64 = points.iter()
                .map(|p| f64::from(p.weight) * f64::from((p.at - r).abs())).sum();
            prop_assert!((cost - best).abs() < 1e-9);
            let sorted = scan(&mut points, pairs.iter().map(|p| f64::from(p.1)).sum::<f64>() / 2.0);
            prop_assert_eq!(sorted.to_bits(), r.to_bits());
        }
    }

    #[test]
    fn beyond_all_weight_is_infinite() {
        let mut points = vec![
            Point {
                at: 1.0,
                weight: 1.0
            };
            40
        ];
        assert!(quantile(&mut points, 41.0).is_infinite());
        assert!(quantile(&mut [], 1.0).is_infinite());
    }
}
