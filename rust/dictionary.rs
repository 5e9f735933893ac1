//! Sparse atoms, readable by atom and by site.

use crate::rows::{Entry, Lists, transpose};

/// Atoms as sparse lists over sites, with their transpose and masses kept in step.
#[derive(Debug, Clone)]
pub(crate) struct Dictionary {
    atoms: Lists,
    by_site: Lists,
    mass: Vec<f64>,
}

impl Dictionary {
    /// `n_atoms` empty atoms over `n_sites` sites.
    pub fn empty(n_atoms: usize, n_sites: usize) -> Self {
        let (atoms, by_site) = (vec![Vec::new(); n_atoms], vec![Vec::new(); n_sites]);
        Self {
            atoms,
            by_site,
            mass: vec![0.0; n_atoms],
        }
    }

    /// The dictionary whose site lists are given.
    pub fn from_sites(by_site: Lists, n_atoms: usize) -> Self {
        let atoms = transpose(&by_site, n_atoms);
        let mass = atoms.iter().map(|atom| total(atom)).collect();
        Self {
            atoms,
            by_site,
            mass,
        }
    }

    /// The dictionary whose atoms are given.
    pub fn from_atoms(atoms: Lists, n_sites: usize) -> Self {
        let by_site = transpose(&atoms, n_sites);
        let mass = atoms.iter().map(|atom| total(atom)).collect();
        Self {
            atoms,
            by_site,
            mass,
        }
    }

    /// Number of sites.
    pub fn n_sites(&self) -> usize {
        self.by_site.len()
    }

    /// Members of one atom, by site.
    pub fn atom(&self, atom: usize) -> &[Entry] {
        &self.atoms[atom]
    }

    /// All atoms.
    pub fn atoms(&self) -> &Lists {
        &self.atoms
    }

    /// Atoms that hold a site.
    pub fn at(&self, site: usize) -> &[Entry] {
        &self.by_site[site]
    }

    /// Sum of an atom's entries.
    pub fn mass(&self, atom: usize) -> f64 {
        self.mass[atom]
    }

    /// Replaces one atom.
    pub fn set(&mut self, atom: usize, members: Vec<Entry>) {
        let index = atom as u32;
        for old in &self.atoms[atom] {
            self.by_site[old.index as usize].retain(|entry| entry.index != index);
        }
        for new in &members {
            let list = &mut self.by_site[new.index as usize];
            let place = list.partition_point(|entry| entry.index < index);
            list.insert(
                place,
                Entry {
                    index,
                    value: new.value,
                },
            );
        }
        self.mass[atom] = total(&members);
        self.atoms[atom] = members;
    }

    /// Multiplies one atom by a factor.
    pub fn scale(&mut self, atom: usize, factor: f32) {
        let scaled = |entry: &Entry| Entry {
            value: (entry.value * factor).min(1.0),
            ..*entry
        };
        let members = self.atoms[atom].iter().map(scaled).collect();
        self.set(atom, members);
    }
}

fn total(entries: &[Entry]) -> f64 {
    entries.iter().map(|entry| f64::from(entry.value)).sum()
}
