//! Dictionary update: every site's entries by exact weighted medians over the rows.
//!
//! Given the codes, sites are independent. An entry that is zero can only rise if more than half of
//! its atom's weighted use falls on rows where the site still has something to explain, so only
//! those are tried.

use crate::dictionary::Dictionary;
use crate::level::Level;
use crate::median::{Point, quantile};
use crate::parallel::Pool;
use crate::rows::{Entry, Lists};

const SWEEPS: usize = 6;
/// Residuals and steps below this count as zero.
const FLAT: f32 = 1e-6;

/// The pull of a finer level on this level's atoms: its reconstruction of them.
pub(crate) struct Pull {
    /// Weight of each atom, `u / N` of the objective.
    pub weight: Vec<f64>,
    /// For each site the reconstructed entries, sorted by atom.
    pub sites: Lists,
}

struct Desk {
    residual: Vec<f32>,
    score: Vec<f64>,
    points: Vec<Point>,
}

struct Update<'a> {
    level: &'a Level,
    users: Lists,
    /// Weighted use of each atom, the pull's weight included.
    mass: Vec<f64>,
    pull: Option<&'a Pull>,
}

/// Replaces the dictionary by a better one for the same codes.
pub(crate) fn update(level: &mut Level, pool: &Pool, pull: Option<&Pull>) {
    let users = level.users();
    let used = |rows: &Vec<Entry>| -> f64 {
        rows.iter()
            .map(|e| level.target.weight[e.index as usize] * f64::from(e.value))
            .sum()
    };
    let mut mass: Vec<f64> = users.iter().map(used).collect();
    if let Some(pull) = pull {
        mass.iter_mut()
            .zip(&pull.weight)
            .for_each(|(mass, weight)| *mass += weight);
    }
    let update = Update {
        level,
        users,
        mass,
        pull,
    };
    let (n_rows, n_atoms) = (level.n_rows(), level.n_atoms());
    let desk = || Desk {
        residual: vec![0.0; n_rows],
        score: vec![0.0; n_atoms],
        points: vec![],
    };
    let sites = pool.map(level.dictionary.n_sites(), desk, |desk, site| {
        update.site(desk, site)
    });
    level.dictionary = Dictionary::from_sites(sites, n_atoms);
    level.clear_empty();
}

impl Update<'_> {
    /// The new entries of one site, sorted by atom.
    fn site(&self, desk: &mut Desk, site: usize) -> Vec<Entry> {
        self.load(desk, site);
        let mut entries = self.candidates(desk, site);
        for _ in 0..SWEEPS {
            let mut moved = false;
            for entry in &mut entries {
                let value = self.line(desk, site, *entry);
                let step = value - entry.value;
                if step.abs() > FLAT {
                    for user in &self.users[entry.index as usize] {
                        desk.residual[user.index as usize] -= step * user.value;
                    }
                    entry.value = value;
                    moved = true;
                }
            }
            if !moved || entries.len() < 2 {
                break;
            }
        }
        entries.retain(|entry| entry.value > 0.0);
        entries
    }

    fn load(&self, desk: &mut Desk, site: usize) {
        desk.residual.fill(0.0);
        for entry in self.level.target.columns.row(site) {
            desk.residual[entry.index as usize] = entry.value;
        }
        for entry in self.level.dictionary.at(site) {
            for user in &self.users[entry.index as usize] {
                desk.residual[user.index as usize] -= entry.value * user.value;
            }
        }
    }

    /// Present entries, and absent ones that would rise, sorted by atom.
    fn candidates(&self, desk: &mut Desk, site: usize) -> Vec<Entry> {
        let mut entries = self.level.dictionary.at(site).to_vec();
        desk.score.fill(0.0);
        for entry in self.level.target.columns.row(site) {
            let row = entry.index as usize;
            if desk.residual[row] <= FLAT {
                continue;
            }
            for code in &self.level.codes[row] {
                desk.score[code.index as usize] +=
                    self.level.target.weight[row] * f64::from(code.value);
            }
        }
        if let Some(pull) = self.pull {
            for entry in &pull.sites[site] {
                desk.score[entry.index as usize] += pull.weight[entry.index as usize];
            }
        }
        for (atom, &score) in desk.score.iter().enumerate() {
            if score > 0.5 * self.mass[atom] && score > 0.0 {
                let index = atom as u32;
                if let Err(at) = entries.binary_search_by_key(&index, |entry| entry.index) {
                    entries.insert(at, Entry { index, value: 0.0 });
                }
            }
        }
        entries
    }

    /// The best value of one entry, all others fixed; the nearest one if there are several.
    ///
    /// As for codes, an entry that is best already costs one pass over the signs.
    fn line(&self, desk: &mut Desk, site: usize, entry: Entry) -> f32 {
        let atom = entry.index as usize;
        let (mut above, mut below) = (0.0_f64, 0.0_f64);
        for user in &self.users[atom] {
            let row = user.index as usize;
            let weight = self.level.target.weight[row] * f64::from(user.value);
            above += if desk.residual[row] > FLAT {
                weight
            } else {
                0.0
            };
            below += if desk.residual[row] < -FLAT {
                weight
            } else {
                0.0
            };
        }
        let pull = self.pulled(site, entry);
        if let Some(pull) = pull {
            above += if pull.at > 0.0 {
                f64::from(pull.weight)
            } else {
                0.0
            };
            below += if pull.at < 0.0 {
                f64::from(pull.weight)
            } else {
                0.0
            };
        }
        let mass = self.mass[atom];
        let (up, down, least) = (mass - 2.0 * above, mass - 2.0 * below, -1e-9 * mass);
        if up < least && entry.value < 1.0 {
            (entry.value + self.reach(desk, atom, pull, 1.0, -0.5 * up)).min(1.0)
        } else if down < least && entry.value > 0.0 {
            (entry.value - self.reach(desk, atom, pull, -1.0, -0.5 * down)).max(0.0)
        } else {
            entry.value
        }
    }

    /// Where the finer level pulls an entry to, from where it is, and how strongly.
    fn pulled(&self, site: usize, entry: Entry) -> Option<Point> {
        let pull = self.pull?;
        let found = pull.sites[site].binary_search_by_key(&entry.index, |entry| entry.index);
        let to = found.map_or(0.0, |at| pull.sites[site][at].value);
        Some(Point {
            at: to - entry.value,
            weight: pull.weight[entry.index as usize] as f32,
        })
    }

    /// How far an entry can go in one direction until its slope has risen by twice `rise`.
    fn reach(
        &self,
        desk: &mut Desk,
        atom: usize,
        pull: Option<Point>,
        sign: f32,
        rise: f64,
    ) -> f32 {
        desk.points.clear();
        for user in &self.users[atom] {
            let row = user.index as usize;
            let rest = sign * desk.residual[row];
            if rest > FLAT {
                let weight = (self.level.target.weight[row] * f64::from(user.value)) as f32;
                let at = rest / user.value;
                desk.points.push(Point { at, weight });
            }
        }
        if let Some(pull) = pull
            && sign * pull.at > 0.0
        {
            let (at, weight) = (sign * pull.at, pull.weight);
            desk.points.push(Point { at, weight });
        }
        let reach = quantile(&mut desk.points, rise);
        if reach.is_finite() { reach } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Target;
    use crate::objective::terms;
    use crate::params::Lambda;
    use crate::rows::Rows;
    use proptest::prelude::*;

    const SITES: usize = 5;
    const ATOMS: usize = 3;

    fn lists(dense: &[Vec<u8>], scale: f32) -> Lists {
        let row = |row: &Vec<u8>| {
            let all = row.iter().enumerate().filter(|(_, v)| **v > 0);
            all.map(|(i, &v)| Entry {
                index: i as u32,
                value: f32::from(v) * scale,
            })
            .collect()
        };
        dense.iter().map(row).collect()
    }

    fn level(x: &[Vec<u8>], atoms: &[Vec<u8>], codes: &[Vec<u8>]) -> Level {
        let rows = Rows::from_lists(&lists(x, 0.25), SITES);
        let weight = vec![1.0 / x.len() as f64; x.len()];
        let mut level = Level::empty(Target::new(rows, weight), ATOMS);
        level.dictionary = Dictionary::from_atoms(lists(atoms, 0.25), SITES);
        level.codes = lists(codes, 0.5);
        level.tighten();
        level
    }

    fn matrix(rows: usize, columns: usize, levels: u8) -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(0..levels, columns), rows)
    }

    proptest! {
        #[test]
        fn lowers_the_error_and_settles_where_no_entry_can_be_improved(
            x in matrix(7, SITES, 6), atoms in matrix(ATOMS, SITES, 5), codes in matrix(7, ATOMS, 3)
        ) {
            let pool = Pool::new(1).unwrap();
            let error = |level: &Level| {
                let lambda = Lambda { dictionary_size: 1.0, sparsity: 0.0, reconstruction: 1.0 };
                terms(level, &pool, lambda).reconstruction
            };
            let mut level = level(&x, &atoms, &codes);
            let mut last = error(&level);
            // Along a ridge of the error the steps may be small and many. Every one must lower it;
            // what holds at the end is only asked of runs that come to one.
            let mut settled = false;
            for _ in 0..200 {
                update(&mut level, &pool, None);
                let now = error(&level);
                prop_assert!(now <= last + 1e-6);
                settled = last - now < 1e-9;
                last = now;
                if settled {
                    break;
                }
            }
            prop_assume!(settled);
            for (atom, site) in (0..ATOMS).flat_map(|a| (0..SITES as u32).map(move |s| (a, s))) {
                for step in 0..=20_u8 {
                    let mut trial = level.clone();
                    let mut members = trial.dictionary.atom(atom).to_vec();
                    crate::level::set_code(&mut members, site, f32::from(step) / 20.0);
                    trial.dictionary.set(atom, members);
                    prop_assert!(error(&trial) >= last - 1e-6);
                }
            }
        }
    }
}
