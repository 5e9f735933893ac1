use super::*;
use crate::error::Error;
use crate::square::learner::tests::grouped;

fn params(atoms: &[usize], dictionary_size: f64) -> SquareParams {
    SquareParams {
        atoms: atoms.to_vec(),
        copies: false,
        dictionary_size,
        sparsity: 1.0,
        reconstruction: 300.0,
        passes: 6.0,
        batch: 0,
        max_iterations: 60,
        tolerance: 1e-4,
        seed: 1,
        threads: 1,
    }
}

fn fit(params: SquareParams, watch: &mut Watcher) -> Fit {
    let (starts, sites, values) = grouped(400);
    let sheet = Sheet::new(&starts, &sites, &values, 40).unwrap();
    fit_square(sheet, &params.check().unwrap(), watch).unwrap()
}

fn sites(atom: &[Entry]) -> Vec<u32> {
    let largest = atom.iter().map(|entry| entry.value).fold(0.0, f32::max);
    let members = atom.iter().filter(|entry| entry.value > 0.3 * largest);
    members.map(|entry| entry.index).collect()
}

#[test]
fn finds_the_groups_and_only_those() {
    let found = fit(params(&[14, 20], 1.0), &mut |_| true);
    assert_eq!(found.stop, StopReason::Tolerance);
    let mut live: Vec<Vec<u32>> = found.levels[0]
        .atoms
        .iter()
        .filter(|atom| !atom.is_empty())
        .map(|a| sites(a))
        .collect();
    live.sort();
    let groups: Vec<Vec<u32>> = (0..8)
        .map(|group| (group * 5..group * 5 + 5).collect())
        .collect();
    assert_eq!(live, groups);
    for pair in found.history.windows(2) {
        let exact = pair[1].stage.starts_with("level") && pair[0].stage == pair[1].stage;
        assert!(!exact || pair[1].terms.total <= pair[0].terms.total * (1.0 + 1e-6));
    }
    let usage = &found.levels[0].usage;
    assert!(usage.windows(2).all(|pair| pair[0] >= pair[1]));
    assert_eq!(found.levels[1].codes.len(), 14);
}

#[test]
fn threads_change_nothing() {
    let one = fit(params(&[14, 20], 0.5), &mut |_| true);
    let three = fit(
        SquareParams {
            threads: 3,
            ..params(&[14, 20], 0.5)
        },
        &mut |_| true,
    );
    assert_eq!(one.history, three.history);
    for (a, b) in one.levels.iter().zip(&three.levels) {
        assert_eq!((&a.atoms, &a.codes), (&b.atoms, &b.codes));
    }
}

#[test]
fn stops_when_told() {
    let stopped = fit(params(&[8, 8], 1.0), &mut |_| false);
    assert_eq!(
        (stopped.stop, stopped.history.len()),
        (StopReason::Interrupted, 2)
    );
    assert_eq!(stopped.levels.len(), 2);
}

#[test]
fn nothing_to_fit() {
    let sheet = Sheet::new(&[0, 0, 0], &[], &[], 4).unwrap();
    let found = fit_square(sheet, &params(&[3, 2], 1.0).check().unwrap(), &mut |_| true).unwrap();
    assert_eq!(found.stop, StopReason::NothingToFit);
    assert!(
        found
            .levels
            .iter()
            .all(|level| level.atoms.iter().all(Vec::is_empty))
    );
}

#[test]
fn more_atoms_than_rows_is_no_trouble() {
    let sheet = Sheet::new(&[0, 1, 2], &[0, 1], &[1.0, 2.0], 3).unwrap();
    let found = fit_square(sheet, &params(&[40, 70], 0.0).check().unwrap(), &mut |_| {
        true
    })
    .unwrap();
    assert_eq!(
        found.levels[0]
            .atoms
            .iter()
            .filter(|atom| !atom.is_empty())
            .count(),
        2
    );
}

#[test]
fn names_the_bad_field() {
    let bad = [
        (
            "atoms",
            SquareParams {
                atoms: vec![],
                ..params(&[2], 1.0)
            },
        ),
        ("dictionary_size", params(&[2], -1.0)),
        (
            "sparsity",
            SquareParams {
                sparsity: f64::NAN,
                ..params(&[2], 1.0)
            },
        ),
        (
            "reconstruction",
            SquareParams {
                reconstruction: 0.0,
                ..params(&[2], 1.0)
            },
        ),
        (
            "passes",
            SquareParams {
                passes: f64::INFINITY,
                ..params(&[2], 1.0)
            },
        ),
        (
            "max_iterations",
            SquareParams {
                max_iterations: 0,
                ..params(&[2], 1.0)
            },
        ),
        (
            "tolerance",
            SquareParams {
                tolerance: -1.0,
                ..params(&[2], 1.0)
            },
        ),
    ];
    for (expected, params) in bad {
        match params.check() {
            Err(Error::Setting { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}
