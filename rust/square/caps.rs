//! One atom's whole column of codes and its cap, jointly and exactly.
//!
//! Over the rows that use an atom the objective is `s m + sum_c w_c g/2 (min(u_c, m) - u_c)^2` up to
//! a constant, with the cap m, the free optima `u_c`, and g = lambda 2 times the atom's squared norm.
//! It is convex in m; its slope `s - g sum_{u_c > m} w_c (u_c - m)` is zero at the best cap, and the
//! atom is off when the slope is not negative at m = 0.

/// A row's free optimum and its weight times g.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub free: f32,
    pub weight: f64,
}

/// The cap that minimises `size m + sum weight/2 (min(free, m) - free)^2`; sorts the wishes.
pub(crate) fn best_cap(wishes: &mut [Wish], size: f64) -> f32 {
    wishes.sort_unstable_by(|a, b| b.free.total_cmp(&a.free));
    let (mut mass, mut sum) = (0.0, 0.0);
    for (at, wish) in wishes.iter().enumerate() {
        mass += wish.weight;
        sum += wish.weight * f64::from(wish.free);
        let below = wishes
            .get(at + 1)
            .map_or(0.0, |next| f64::from(next.free).max(0.0));
        // The slope at the next free optimum: if it is negative there, the cap lies above it.
        if sum - mass * below >= size && mass > 0.0 {
            return ((sum - size) / mass).max(0.0) as f32;
        }
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cost(wishes: &[Wish], size: f64, cap: f64) -> f64 {
        let each = |wish: &Wish| {
            let short = (f64::from(wish.free) - cap).max(0.0);
            0.5 * wish.weight * short * short
        };
        size * cap + wishes.iter().map(each).sum::<f64>()
    }

    proptest! {
        #[test]
        fn no_other_cap_is_better(
            wishes in prop::collection::vec((0.0_f32..5.0, 0.01_f64..2.0), 1..12),
            size in 0.0_f64..6.0,
        ) {
            let wish = |&(free, weight): &(f32, f64)| Wish { free, weight };
            let mut wishes: Vec<Wish> = wishes.iter().map(wish).collect();
            let cap = f64::from(best_cap(&mut wishes, size));
            let found = cost(&wishes, size, cap);
            for step in 0..=500 {
                prop_assert!(found <= cost(&wishes, size, f64::from(step) / 100.0) + 1e-5);
            }
        }
    }

    #[test]
    fn two_rows_by_hand() {
        let wishes = |a, b| {
            [
                Wish {
                    free: a,
                    weight: 1.0,
                },
                Wish {
                    free: b,
                    weight: 1.0,
                },
            ]
        };
        // Above 1 only the first row pulls: 3 - m = 1 at m = 2.
        assert!((best_cap(&mut wishes(3.0, 1.0), 1.0) - 2.0).abs() < 1e-6);
        // Below 1 both do: (3 - m) + (1 - m) = 3 at m = 0.5.
        assert!((best_cap(&mut wishes(1.0, 3.0), 3.0) - 0.5).abs() < 1e-6);
        assert!(best_cap(&mut wishes(3.0, 1.0), 4.0).abs() < 1e-6);
        assert!((best_cap(&mut wishes(3.0, 1.0), 0.0) - 3.0).abs() < 1e-6);
    }
}
