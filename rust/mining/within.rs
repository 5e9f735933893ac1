//! Chance inside one layer, where a router that picks the k best makes experts exclude each other.
//!
//! The null is the uniform distribution over tables with each row's number of experts and each
//! expert's load. Its rows are taken as independent draws of fixed size with weights w fitted to
//! the loads (conditional Poisson sampling; Chen, Dempster and Liu 1994, the weights by their
//! iteration), which is the table distribution of largest entropy that keeps row sizes exactly and
//! loads on average. It gives the mean count of every pair.

/// Sweeps of the fit at most.
const SWEEPS: usize = 300;
/// The loads are met to this fraction.
const TOLERANCE: f64 = 1e-9;

/// A number of experts in a row, and how many rows have it.
pub(super) type Group = (usize, f64);

/// Mean counts of all pairs of experts, (n, n) row by row; the diagonal is left 0.
///
/// `loads` are above 0 and at most the number of rows; `groups` tell the sizes of the rows.
pub(super) fn expected_pairs(loads: &[f64], groups: &[Group]) -> Vec<f64> {
    let n_rows: f64 = groups.iter().map(|group| group.1).sum();
    let always = |load: f64| load >= n_rows;
    let n_always = loads.iter().filter(|&&load| always(load)).count();
    let free: Vec<usize> = (0..loads.len()).filter(|&i| !always(loads[i])).collect();
    let targets: Vec<f64> = free.iter().map(|&i| loads[i]).collect();
    let rest: Vec<Group> = groups
        .iter()
        .map(|&(size, rows)| (size - n_always, rows))
        .collect();
    let weights = fit(&targets, &rest);
    let mut out = vec![0.0; loads.len() * loads.len()];
    for (i, &one) in loads.iter().enumerate() {
        for (j, &two) in loads.iter().enumerate() {
            if i != j && (always(one) || always(two)) {
                out[i * loads.len() + j] = one.min(two);
            }
        }
    }
    for (x, &i) in free.iter().enumerate() {
        let others: Vec<usize> = (0..free.len()).filter(|&y| y != x).collect();
        let left: Vec<f64> = others.iter().map(|&y| weights[y]).collect();
        for (z, pair) in joint(&left, weights[x], &weights, &rest)
            .into_iter()
            .enumerate()
        {
            out[i * loads.len() + free[others[z]]] = pair;
        }
    }
    out
}

/// Weights whose draws of fixed size give the loads.
fn fit(targets: &[f64], groups: &[Group]) -> Vec<f64> {
    let total: f64 = groups.iter().map(|group| group.1).sum();
    let mut weights: Vec<f64> = targets.iter().map(|load| load / (total - load)).collect();
    for _ in 0..SWEEPS {
        let found = inclusions(&weights, groups);
        let mut worst = 0.0_f64;
        for ((weight, &load), &own) in weights.iter_mut().zip(targets).zip(&found) {
            *weight *= load / own;
            worst = worst.max((load / own - 1.0).abs());
        }
        let sum: f64 = weights.iter().sum();
        let scale = weights.len() as f64 / sum;
        for weight in &mut weights {
            *weight *= scale;
        }
        if worst < TOLERANCE {
            break;
        }
    }
    weights
}

/// Mean load of every expert under the weights.
fn inclusions(weights: &[f64], groups: &[Group]) -> Vec<f64> {
    let largest = largest(groups);
    let all = symmetric(weights, largest);
    let without = leave_one_out(weights, largest);
    let each = weights.iter().zip(without.chunks(largest + 1));
    each.map(|(&weight, rest)| mean(groups, &all, 1, |left| weight * rest[left]))
        .collect()
}

/// Mean counts of one expert of weight `own` with each of the others.
fn joint(others: &[f64], own: f64, weights: &[f64], groups: &[Group]) -> Vec<f64> {
    let largest = largest(groups);
    let all = symmetric(weights, largest);
    let without = leave_one_out(others, largest);
    let each = others.iter().zip(without.chunks(largest + 1));
    each.map(|(&weight, rest)| mean(groups, &all, 2, |left| own * weight * rest[left]))
        .collect()
}

fn largest(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.0).max().unwrap_or(0)
}

/// Sum over rows of part(size − taken) / all\[size\].
fn mean(groups: &[Group], all: &[f64], taken: usize, part: impl Fn(usize) -> f64) -> f64 {
    let rows = groups
        .iter()
        .filter(|&&(size, rows)| size >= taken && rows > 0.0);
    rows.map(|&(size, rows)| rows * part(size - taken) / all[size])
        .sum()
}

/// Elementary symmetric polynomials of degree 0 to `degree`.
fn symmetric(weights: &[f64], degree: usize) -> Vec<f64> {
    let mut out = vec![0.0; degree + 1];
    out[0] = 1.0;
    for &weight in weights {
        multiply(&mut out, weight);
    }
    out
}

fn multiply(polynomial: &mut [f64], weight: f64) {
    for power in (1..polynomial.len()).rev() {
        polynomial[power] += weight * polynomial[power - 1];
    }
}

/// The polynomials of all weights but one, for each: (n, degree + 1).
///
/// Products of what comes before and after, since dividing out loses digits for heavy experts.
fn leave_one_out(weights: &[f64], degree: usize) -> Vec<f64> {
    let (n, wide) = (weights.len(), degree + 1);
    let mut after = vec![0.0; (n + 1) * wide];
    after[n * wide] = 1.0;
    for i in (0..n).rev() {
        let (head, tail) = after.split_at_mut((i + 1) * wide);
        head[i * wide..].copy_from_slice(&tail[..wide]);
        multiply(&mut head[i * wide..], weights[i]);
    }
    let mut before = vec![0.0; wide];
    before[0] = 1.0;
    let mut out = vec![0.0; n * wide];
    for i in 0..n {
        let rest = &after[(i + 1) * wide..(i + 2) * wide];
        for power in 0..wide {
            out[i * wide + power] = (0..=power).map(|p| before[p] * rest[power - p]).sum();
        }
        multiply(&mut before, weights[i]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_rows_split_their_experts_at_random() {
        // Two rows of two experts, all four different: a pair is together in 1 of 3 splits.
        for pair in expected_pairs(&[1.0; 4], &[(2, 2.0)])
            .chunks(5)
            .flat_map(|row| &row[1..])
        {
            assert!((pair - 1.0 / 3.0).abs() < 1e-9);
        }
    }

    #[test]
    fn an_expert_that_is_always_there_meets_all() {
        let found = expected_pairs(&[4.0, 1.0, 3.0], &[(2, 4.0)]);
        assert_eq!(found, [0.0, 1.0, 3.0, 1.0, 0.0, 0.0, 3.0, 0.0, 0.0]);
    }

    proptest! {
        #[test]
        fn pairs_add_up_to_what_rows_hold(
            rows in prop::collection::vec(prop::collection::btree_set(0_usize..7, 0..5), 2..40),
        ) {
            let mut loads = vec![0.0_f64; 7];
            let mut groups = vec![0.0; 8];
            for row in &rows {
                groups[row.len()] += 1.0;
                for &site in row {
                    loads[site] += 1.0;
                }
            }
            let loads: Vec<f64> = loads.into_iter().filter(|&load| load > 0.0).collect();
            let groups: Vec<Group> = groups.into_iter().enumerate().filter(|g| g.1 > 0.0).collect();
            let found = expected_pairs(&loads, &groups);
            let expected: f64 = rows.iter().map(|row| (row.len() * row.len().saturating_sub(1)) as f64).sum();
            prop_assert!((found.iter().sum::<f64>() - expected).abs() < 1e-6 * expected.max(1.0));
            for i in 0..loads.len() {
                for j in 0..loads.len() {
                    let (one, two) = (found[i * loads.len() + j], found[j * loads.len() + i]);
                    prop_assert!((one - two).abs() < 1e-6 && one >= 0.0);
                }
            }
        }
    }
}
