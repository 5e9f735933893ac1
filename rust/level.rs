//! One level of the hierarchy: targets, atoms and codes.

use crate::dictionary::Dictionary;
use crate::rows::{Entry, Lists, Rows, transpose};

/// Rows to be explained, with the weight of each.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub rows: Rows,
    pub columns: Rows,
    pub weight: Vec<f64>,
}

impl Target {
    /// Rows with their weights (`u / N` of the objective).
    pub fn new(rows: Rows, weight: Vec<f64>) -> Self {
        let columns = rows.columns();
        Self {
            rows,
            columns,
            weight,
        }
    }
}

/// Targets with the atoms and codes that explain them.
///
/// Each row's codes are sorted by atom, positive and at most the atom's cap; between passes the cap
/// is the atom's largest code.
#[derive(Debug, Clone)]
pub(crate) struct Level {
    pub target: Target,
    pub dictionary: Dictionary,
    pub codes: Lists,
    pub caps: Vec<f32>,
    /// Made of pieces of coarser atoms, which must not be joined to those atoms again.
    pub finer: bool,
}

impl Level {
    /// A level without any live atom.
    pub fn empty(target: Target, n_atoms: usize) -> Self {
        let (n_rows, n_sites) = (target.rows.len(), target.rows.n_sites());
        let dictionary = Dictionary::empty(n_atoms, n_sites);
        Self {
            target,
            dictionary,
            codes: vec![Vec::new(); n_rows],
            caps: vec![0.0; n_atoms],
            finer: false,
        }
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.codes.len()
    }

    /// Number of atoms, dead ones included.
    pub fn n_atoms(&self) -> usize {
        self.caps.len()
    }

    /// Number of atoms in use.
    pub fn n_live(&self) -> usize {
        self.caps.iter().filter(|cap| **cap > 0.0).count()
    }

    /// For each atom the rows that use it.
    pub fn users(&self) -> Lists {
        transpose(&self.codes, self.n_atoms())
    }

    /// Total code of each atom over all rows.
    pub fn usage(&self) -> Vec<f64> {
        let mut usage = vec![0.0; self.n_atoms()];
        for entry in self.codes.iter().flatten() {
            usage[entry.index as usize] += f64::from(entry.value);
        }
        usage
    }

    /// Sets every cap to the atom's largest code.
    pub fn tighten(&mut self) {
        self.caps.fill(0.0);
        for entry in self.codes.iter().flatten() {
            let cap = &mut self.caps[entry.index as usize];
            *cap = cap.max(entry.value);
        }
    }

    /// Takes codes of atoms without members away: they explain nothing and cost.
    pub fn clear_empty(&mut self) {
        let dictionary = &self.dictionary;
        for row in &mut self.codes {
            row.retain(|code| !dictionary.atom(code.index as usize).is_empty());
        }
        self.tighten();
    }

    /// Empties atoms that no row uses.
    pub fn clear_dead(&mut self) {
        for atom in 0..self.n_atoms() {
            if self.caps[atom] <= 0.0 && !self.dictionary.atom(atom).is_empty() {
                self.dictionary.set(atom, Vec::new());
            }
        }
    }

    /// Scales every live atom so that its largest entry is 1, codes inversely.
    ///
    /// The product stays, dictionary size and sparsity fall. No single coordinate can make this
    /// move, so without it the descent would stop at atoms of any scale.
    pub fn rescale(&mut self) {
        let mut factors = vec![1.0; self.n_atoms()];
        for (atom, factor) in factors.iter_mut().enumerate() {
            let largest = self
                .dictionary
                .atom(atom)
                .iter()
                .map(|e| e.value)
                .fold(0.0, f32::max);
            if largest > 0.0 && largest < 1.0 {
                *factor = largest;
                self.dictionary.scale(atom, 1.0 / largest);
            }
        }
        for entry in self.codes.iter_mut().flatten() {
            entry.value *= factors[entry.index as usize];
        }
        self.tighten();
    }
}

/// Sets one code of a sorted row, removing it at 0.
pub(crate) fn set_code(row: &mut Vec<Entry>, atom: u32, value: f32) {
    match row.binary_search_by_key(&atom, |entry| entry.index) {
        Ok(at) if value > 0.0 => row[at].value = value,
        Ok(at) => {
            row.remove(at);
        }
        Err(at) if value > 0.0 => row.insert(at, Entry { index: atom, value }),
        Err(_) => {}
    }
}
