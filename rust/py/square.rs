//! The squared-error engine: `encode_square`.

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::{Error, Result};
use crate::parallel::Pool;
use crate::py::errors;
use crate::py::square_rows::{self, Held};
use crate::square::{Encoding, demand, encode, not_negative};

/// Coding settings as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct EncodeSettings {
    sparsity: f64,
    reconstruction: f64,
    tolerance: f64,
    caps: Option<Vec<f32>>,
    gap: bool,
    threads: usize,
}

/// Codes of sparse rows on fixed atoms, under squared error.
#[pyfunction]
#[allow(
    clippy::needless_pass_by_value,
    reason = "what Python passes is extracted"
)]
pub(crate) fn encode_square<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    atoms: &Bound<'py, PyAny>,
    settings: EncodeSettings,
) -> PyResult<Bound<'py, PyDict>> {
    let core = |error| errors::to_python(py, &error);
    let held = Held::new(rows)?;
    let draft = held.draft(n_sites)?;
    let atoms = square_rows::atoms(atoms, n_sites)?;
    let codes = py
        .detach(|| {
            let how = settings.checked(atoms.n_rows())?;
            encode(&draft, &atoms, &how, &Pool::new(settings.threads)?)
        })
        .map_err(core)?;
    let out = PyDict::new(py);
    out.set_item("indptr", PyArray1::from_vec(py, codes.starts))?;
    out.set_item("atom", PyArray1::from_vec(py, codes.atoms))?;
    out.set_item("value", PyArray1::from_vec(py, codes.values))?;
    out.set_item(
        "gap",
        settings.gap.then(|| PyArray1::from_vec(py, codes.gaps)),
    )?;
    Ok(out)
}

impl EncodeSettings {
    fn checked(&self, n_atoms: usize) -> Result<Encoding> {
        not_negative("sparsity", self.sparsity)?;
        let positive = self.reconstruction > 0.0;
        demand(
            "reconstruction",
            self.reconstruction,
            positive,
            "finite and above 0",
        )?;
        not_negative("tolerance", self.tolerance)?;
        if let Some(caps) = &self.caps {
            check_caps(caps, n_atoms)?;
        }
        Ok(Encoding {
            penalty: (self.sparsity / self.reconstruction) as f32,
            tolerance: self.tolerance as f32,
            caps: self.caps.clone(),
            gap: self.gap,
        })
    }
}

fn check_caps(caps: &[f32], n_atoms: usize) -> Result<()> {
    if caps.len() != n_atoms {
        let (got, expected) = (caps.len(), n_atoms);
        return Err(Error::Length {
            what: "caps",
            got,
            expected,
        });
    }
    match caps.iter().position(|cap| cap.is_nan() || *cap < 0.0) {
        None => Ok(()),
        Some(position) => Err(Error::Value {
            what: "caps",
            got: caps[position].to_string(),
            position,
            allowed: "at least 0",
        }),
    }
}
