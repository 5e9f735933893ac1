//! Codes of all rows on a fixed dictionary.

use crate::error::{Error, Result};
use crate::parallel::Pool;
use crate::params::check_size;
use crate::square::coder::{Coder, Desk};
use crate::square::correlate::{Block, Correlator, gram};
use crate::square::gap::Gap;
use crate::square::matrix::Matrix;
use crate::square::panels::Panels;
use crate::square::sheet::{Draft, LARGEST};
use crate::square::thin::BLOCK;

/// How rows are coded.
#[derive(Debug, Clone)]
pub(crate) struct Encoding {
    /// lambda 1 over lambda 2, at least 0.
    pub penalty: f32,
    /// A row is done when no code would move by more than this times the penalty.
    pub tolerance: f32,
    /// Largest allowed code of each atom.
    pub caps: Option<Vec<f32>>,
    /// Whether to compute duality gaps.
    pub gap: bool,
}

/// Sparse codes: row `c` owns `starts[c]..starts[c + 1]`, atoms ascending, values positive.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Codes {
    pub starts: Vec<i64>,
    pub atoms: Vec<u32>,
    pub values: Vec<f32>,
    /// Duality gap of each row, if asked for.
    pub gaps: Vec<f64>,
}

impl Codes {
    /// No rows yet.
    pub fn new() -> Self {
        Self {
            starts: vec![0],
            ..Self::default()
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Atoms and values of one row.
    pub fn row(&self, row: usize) -> (&[u32], &[f32]) {
        let range = self.starts[row] as usize..self.starts[row + 1] as usize;
        (&self.atoms[range.clone()], &self.values[range])
    }

    /// Adds a row of dense codes.
    pub fn push(&mut self, codes: &[f32]) {
        let mut at = self.atoms.len();
        // Every place is written and kept only if the code is not 0: no branch to guess wrongly.
        self.atoms.resize(at + codes.len(), 0);
        self.values.resize(at + codes.len(), 0.0);
        for (atom, &code) in codes.iter().enumerate() {
            self.atoms[at] = atom as u32;
            self.values[at] = code;
            at += usize::from(code > 0.0);
        }
        self.atoms.truncate(at);
        self.values.truncate(at);
        self.starts.push(at as i64);
    }

    /// Adds the rows of another set.
    pub fn extend(&mut self, other: &Self) {
        let offset = self.atoms.len() as i64;
        let starts = other.starts[1..].iter().map(|start| start + offset);
        self.starts.extend(starts);
        self.atoms.extend_from_slice(&other.atoms);
        self.values.extend_from_slice(&other.values);
        self.gaps.extend_from_slice(&other.gaps);
    }
}

/// Checks atoms given from outside: not negative, and their squares finite.
pub(crate) fn checked_atoms(flat: &[f32], n_sites: usize) -> Result<Matrix> {
    if flat.is_empty() || n_sites == 0 {
        return Err(Error::Empty { what: "atoms" });
    }
    let n_atoms = flat.len().div_ceil(n_sites);
    check_size(&[n_atoms], n_sites)?;
    if flat.len() != n_atoms * n_sites {
        return Err(Error::Length {
            what: "atoms",
            got: flat.len(),
            expected: n_atoms * n_sites,
        });
    }
    let bad = |value: &f32| !(0.0..=LARGEST).contains(value);
    match flat.iter().position(bad) {
        None => Ok(Matrix::from_flat(flat, n_sites)),
        Some(position) => Err(Error::Value {
            what: "atoms",
            got: flat[position].to_string(),
            position,
            allowed: "finite, not negative and at most 1e9",
        }),
    }
}

/// Codes of all rows; the same for any number of threads.
///
/// # Errors
/// Entries of a row that may not be there, as for [`Draft::sheet`].
pub(crate) fn encode(draft: &Draft, atoms: &Matrix, how: &Encoding, pool: &Pool) -> Result<Codes> {
    let correlator = Correlator::new(atoms, draft.density());
    let gram = match &correlator {
        Correlator::Dense(panels) | Correlator::SparseRows(panels) => gram(atoms, panels),
        Correlator::SparseAtoms(_) => gram(atoms, &Panels::new(atoms)),
    };
    let mut coder = Coder::new(gram, how.penalty, how.tolerance);
    if let Some(caps) = &how.caps {
        coder.set_caps(caps);
    }
    let (n_rows, n_atoms) = (draft.len(), atoms.n_rows());
    let desk = || {
        let block = correlator.block(draft.n_sites(), n_atoms);
        (block, Desk::new(n_atoms), Gap::new(draft.n_sites()))
    };
    let each = |(block, desk, gap): &mut (Block, Desk, Gap), at: usize| {
        let rows = at * BLOCK..((at + 1) * BLOCK).min(n_rows);
        let sheet = draft.rows(rows.clone())?;
        correlator.correlate(&sheet, rows.clone(), block);
        let mut codes = Codes::new();
        for row in rows.clone() {
            block.products(row - rows.start, &mut desk.slopes, n_atoms);
            coder.code(desk);
            codes.push(&desk.codes[..n_atoms]);
            if how.gap {
                let found = gap.of(sheet.row(row), atoms, &desk.codes, how.penalty);
                codes.gaps.push(found);
            }
        }
        Ok(codes)
    };
    let mut all = Codes::new();
    for part in pool.map(n_rows.div_ceil(BLOCK), desk, each) {
        all.extend(&part?);
    }
    Ok(all)
}
