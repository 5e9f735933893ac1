//! Upper tails of counts under chance, as decimal logarithms so that 1e-300 is a number.

use std::f64::consts::{LN_10, PI};

/// Terms below this fraction of their sum are left out.
const NEGLIGIBLE: f64 = 1e-17;
/// Least probability of the matched binomial, where it is as good as Poisson.
const FEW: f64 = 1e-6;
/// Steps of a continued fraction at most; far more than counts of some 10^8 rows need.
const STEPS: usize = 100_000;

/// log10 P(X ≥ count) when two sets of `a` and `b` of `n` rows meet at random.
///
/// X is hypergeometric; the tail is summed term by term from the count outwards, on the shorter
/// side of the mean, so it is exact up to rounding (about 1e-8 of p at a million rows).
pub(crate) fn hypergeometric(count: u32, n: u32, a: u32, b: u32) -> f64 {
    let (k, n, a, b) = (f64::from(count), f64::from(n), f64::from(a), f64::from(b));
    if k <= (a + b - n).max(0.0) {
        return 0.0;
    }
    if k > a.min(b) {
        return f64::NEG_INFINITY;
    }
    let up = |k: f64| (a - k) * (b - k) / ((k + 1.0) * (n - a - b + k + 1.0));
    let first = |k: f64| ln_choose(a, k) + ln_choose(n - a, b - k) - ln_choose(n, b);
    if k > a * b / n {
        return (first(k) + series(k, 1.0, up).ln()) / LN_10;
    }
    let below = first(k - 1.0).exp() * series(k - 1.0, -1.0, |k| 1.0 / up(k - 1.0));
    (-below.min(1.0)).ln_1p() / LN_10
}

/// 1 + r(k) + r(k) r(k + step) + …, for ratios that fall.
fn series(start: f64, step: f64, ratio: impl Fn(f64) -> f64) -> f64 {
    let (mut sum, mut term, mut at) = (1.0, 1.0, start);
    loop {
        let next = ratio(at);
        term *= next;
        if !(next > 0.0 && next.is_finite()) || term < NEGLIGIBLE * sum {
            return sum;
        }
        sum += term;
        at += step;
    }
}

/// What is known of a count under chance.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moments {
    pub mean: f64,
    pub variance: f64,
    /// Third central moment.
    pub third: f64,
    /// The least the count can be.
    pub forced: f64,
}

/// log10 P(X ≥ count) for a sum of independent 0/1 variables with these moments.
///
/// Counts of rows that two fixed sets share, in one stratum or summed over strata, are such sums,
/// since their generating polynomials have real roots only. The tail is that of a shifted binomial
/// with the same mean, variance and third moment, exact for equal variables; for sums over many
/// strata log10 p is within 2 % up to 5 standard deviations and within 20 % up to 20. Counts it
/// cannot reach get the bound of Hoeffding (1956), a binomial of the same mean and `most` trials:
/// their p is too large, never too small.
pub(crate) fn matched(count: u32, moments: &Moments, most: f64) -> f64 {
    let (k, mean) = (
        f64::from(count) - moments.forced,
        moments.mean - moments.forced,
    );
    if k <= 0.0 {
        return 0.0;
    }
    let bound = || binomial(k, most, mean / most).min(0.0);
    let variance = moments.variance;
    if variance <= 1e-9 * mean.max(1e-3) {
        // Nothing left to chance: the count is the mean but for rounding.
        return if k <= mean + 0.5 { 0.0 } else { bound() };
    }
    // p q trials = variance and (q - p) p q trials = third.
    let p = ((1.0 - moments.third / variance) / 2.0).clamp(FEW, 1.0 - FEW);
    let trials = variance / (p * (1.0 - p));
    let k = k - (mean - trials * p);
    if k <= 0.0 {
        return 0.0;
    }
    if k > trials + 1e-6 {
        return bound();
    }
    binomial(k, trials, p).min(0.0)
}

/// log10 P(X ≥ k) of a binomial; trials need not be whole.
fn binomial(k: f64, trials: f64, p: f64) -> f64 {
    if p >= 1.0 {
        return 0.0;
    }
    if p <= 0.0 {
        return f64::NEG_INFINITY;
    }
    let (a, b) = (k, trials - k + 1.0);
    let front = ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * p.ln() + b * (-p).ln_1p();
    if p < (a + 1.0) / (a + b + 2.0) {
        return (front - a.ln() + fraction(a, b, p).ln()) / LN_10;
    }
    let below = (front - b.ln()).exp() * fraction(b, a, 1.0 - p);
    (-below.min(1.0)).ln_1p() / LN_10
}

/// Continued fraction of the incomplete beta function (Lentz's method).
#[allow(
    clippy::many_single_char_names,
    reason = "the letters of the literature"
)]
fn fraction(a: f64, b: f64, x: f64) -> f64 {
    let tiny = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / tiny(1.0 - (a + b) * x / (a + 1.0));
    let mut out = d;
    for step in 1..STEPS {
        let m = step as f64;
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / tiny(1.0 + even * d);
        c = tiny(1.0 + even / c);
        out *= c * d;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / tiny(1.0 + odd * d);
        c = tiny(1.0 + odd / c);
        out *= c * d;
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    out
}

fn ln_choose(n: f64, k: f64) -> f64 {
    ln_gamma(n + 1.0) - ln_gamma(k + 1.0) - ln_gamma(n - k + 1.0)
}

/// Logarithm of the gamma function for x > 0, by Stirling's series above 10.
fn ln_gamma(x: f64) -> f64 {
    if x < 10.0 {
        let steps = (10.0 - x).ceil() as i32;
        let product: f64 = (0..steps).map(|step| x + f64::from(step)).product();
        return ln_gamma(x + f64::from(steps)) - product.ln();
    }
    let square = 1.0 / (x * x);
    let rest = 1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0 - square / 1680.0));
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * PI).ln() + rest / x
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(got: f64, expected: f64) {
        assert!(
            (got - expected).abs() <= 1e-9 * expected.abs().max(1.0),
            "{got} {expected}"
        );
    }

    /// C(n, k) exactly.
    fn choose(n: u32, k: u32) -> f64 {
        if k > n {
            return 0.0;
        }
        (0..k).fold(1.0, |product, i| {
            product * f64::from(n - i) / f64::from(i + 1)
        })
    }

    /// Moments of fair or other coins, of which some always show heads.
    fn coins(n: f64, p: f64, forced: f64) -> Moments {
        let variance = n * p * (1.0 - p);
        Moments {
            mean: n * p + forced,
            variance,
            third: variance * (1.0 - 2.0 * p),
            forced,
        }
    }

    #[test]
    fn a_tail_by_hand() {
        // 2 of 4 rows and 2 of 4 rows share both in 1 of 6 cases, at least one in 5 of 6.
        close(hypergeometric(2, 4, 2, 2), (1.0_f64 / 6.0).log10());
        close(hypergeometric(1, 4, 2, 2), (5.0_f64 / 6.0).log10());
        close(hypergeometric(0, 4, 2, 2), 0.0);
        assert!(hypergeometric(3, 4, 2, 2).is_infinite());
        // Three fair coins: at least two heads in half of the cases.
        close(matched(2, &coins(3.0, 0.5, 0.0), 3.0), 0.5_f64.log10());
        close(matched(5, &coins(3.0, 0.5, 3.0), 6.0), 0.5_f64.log10());
    }

    #[test]
    fn far_tails_do_not_underflow() {
        let far = hypergeometric(90_000, 1_000_000, 94_000, 94_000);
        assert!(far < -50_000.0 && far.is_finite());
        assert!(matched(2_000, &coins(2_500.0, 0.2, 0.0), 1e6) < -300.0);
    }

    #[test]
    fn nothing_left_to_chance_has_p_one() {
        close(matched(7, &coins(0.0, 0.5, 7.0), 10.0), 0.0);
        let rounded = Moments {
            forced: 3.0,
            mean: 7.000_000_1,
            ..Moments::default()
        };
        close(matched(7, &rounded, 10.0), 0.0);
        assert!(matched(9, &rounded, 10.0) < 0.0);
    }

    proptest! {
        #[test]
        fn hypergeometric_tail_equals_the_sum(n in 1_u32..60, a in 0_u32..60, b in 0_u32..60, k in 0_u32..60) {
            let (a, b) = (a.min(n), b.min(n));
            let all: f64 = (k..=a.min(b)).map(|x| {
                if b < x { 0.0 } else { choose(a, x) * choose(n - a, b - x) }
            }).sum();
            let expected = (all / choose(n, b)).log10();
            let got = hypergeometric(k, n, a, b);
            let infinite = got.is_infinite() && expected.is_infinite();
            prop_assert!(infinite || (got - expected).abs() < 1e-9, "{got} {expected}");
        }

        #[test]
        fn binomial_tail_equals_the_sum(n in 1_u32..50, k in 1_u32..50, p in 0.001_f64..0.999) {
            let k = k.min(n);
            let term = |x: u32| choose(n, x) * p.powi(x as i32) * (1.0 - p).powi((n - x) as i32);
            let expected = (k..=n).map(term).sum::<f64>().log10();
            let n = f64::from(n);
            let got = matched(k, &coins(n, p, 0.0), n);
            prop_assert!((got - expected).abs() < 1e-8, "{got} {expected}");
        }
    }
}
