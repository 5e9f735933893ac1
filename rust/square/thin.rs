//! Correlations with sparse atoms: 48 dense rows at a time, site by site.

use pulp::{Arch, Simd, WithSimd};

use crate::square::matrix::{Aligned, Matrix};

/// Rows worked on together.
pub(crate) const BLOCK: usize = 48;
/// Vectors of rows summed at once.
const WIDE: usize = 3;

/// Atoms as lists of sites and values.
#[derive(Debug, Clone)]
pub(crate) struct Thin {
    starts: Vec<usize>,
    sites: Vec<u32>,
    values: Vec<f32>,
}

impl Thin {
    /// The non-zeros of atoms (`n_atoms`, `n_sites`).
    pub fn new(atoms: &Matrix) -> Self {
        let (mut starts, mut sites, mut values) = (vec![0], Vec::new(), Vec::new());
        for atom in 0..atoms.n_rows() {
            for (site, &value) in atoms.row(atom).iter().enumerate() {
                if value != 0.0 {
                    sites.push(site as u32);
                    values.push(value);
                }
            }
            starts.push(sites.len());
        }
        Self {
            starts,
            sites,
            values,
        }
    }

    /// Correlations of 48 rows, given site by site, with all atoms: (`n_atoms`, 48), atom by atom.
    pub fn correlate(&self, block: &Aligned, out: &mut Aligned) {
        for (atom, bounds) in self.starts.windows(2).enumerate() {
            let range = bounds[0]..bounds[1];
            Arch::new().dispatch(OneAtom {
                sites: &self.sites[range.clone()],
                values: &self.values[range],
                block,
                out: &mut out[atom * BLOCK..(atom + 1) * BLOCK],
            });
        }
    }
}

struct OneAtom<'a> {
    sites: &'a [u32],
    values: &'a [f32],
    block: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for OneAtom<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let step = WIDE * S::F32_LANES;
        let (pairs, last) = self.sites.as_chunks::<2>();
        let (values, last_value) = self.values.as_chunks::<2>();
        for column in (0..BLOCK).step_by(step) {
            let mut even = [simd.splat_f32s(0.0); WIDE];
            let mut odd = even;
            for (sites, values) in pairs.iter().zip(values) {
                even = add(simd, even, self.rows::<S>(sites[0], column), values[0]);
                odd = add(simd, odd, self.rows::<S>(sites[1], column), values[1]);
            }
            for (&site, &value) in last.iter().zip(last_value) {
                even = add(simd, even, self.rows::<S>(site, column), value);
            }
            let out = S::as_mut_simd_f32s(&mut self.out[column..column + step]).0;
            for v in 0..WIDE {
                out[v] = simd.add_f32s(even[v], odd[v]);
            }
        }
    }
}

impl OneAtom<'_> {
    /// Some rows' values at a site.
    #[inline(always)]
    fn rows<S: Simd>(&self, site: u32, column: usize) -> &[S::f32s] {
        let from = site as usize * BLOCK + column;
        &S::as_simd_f32s(&self.block[from..from + WIDE * S::F32_LANES]).0[..WIDE]
    }
}

#[inline(always)]
fn add<S: Simd>(
    simd: S,
    mut sums: [S::f32s; WIDE],
    rows: &[S::f32s],
    value: f32,
) -> [S::f32s; WIDE] {
    let value = simd.splat_f32s(value);
    for v in 0..WIDE {
        sums[v] = simd.mul_add_f32s(value, rows[v], sums[v]);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Scalar;

    #[test]
    fn every_instruction_set_gives_the_same() {
        let block: Vec<f32> = (0..9 * BLOCK).map(|i| (i % 13) as f32).collect();
        let (sites, values) = ([0, 3, 4, 7, 8], [1.0, 2.0, 3.0, 4.0, 5.0]);
        let run = |scalar: bool| {
            let mut out = vec![0.0; BLOCK];
            let one = OneAtom {
                sites: &sites,
                values: &values,
                block: &block,
                out: &mut out,
            };
            if scalar {
                one.with_simd(Scalar);
            } else {
                Arch::new().dispatch(one);
            }
            out
        };
        assert_eq!(run(true), run(false));
        let by_hand: f32 = (0..5)
            .map(|i| values[i] * block[sites[i] as usize * BLOCK + 2])
            .sum();
        assert_eq!(run(true)[2].to_bits(), by_hand.to_bits());
    }
}
