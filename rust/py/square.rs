//! The squared-error engine: `encode_square`.

use numpy::{PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::Error;
use crate::parallel::Pool;
use crate::py::arrays::{self, Held};
use crate::py::errors;
use crate::square::{EncodeParams, Matrix, checked_atoms, encode};

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
    let atoms = self::atoms(atoms, n_sites)?;
    let params = EncodeParams {
        sparsity: settings.sparsity,
        reconstruction: settings.reconstruction,
        tolerance: settings.tolerance,
        caps: settings.caps,
        gap: settings.gap,
    };
    let codes = py
        .detach(|| {
            let how = params.check(atoms.n_rows())?;
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

/// Atoms (`n_atoms`, `n_sites`), checked.
pub(crate) fn atoms(argument: &Bound<PyAny>, n_sites: usize) -> PyResult<Matrix> {
    let core = |error| errors::to_python(argument.py(), &error);
    let array = arrays::array::<f32>(argument, "atoms")?;
    let flat = arrays::view(&array, "atoms", 2)?;
    let got = array.shape()[1];
    if got != n_sites {
        let what = "rows of atoms";
        return Err(core(Error::Length {
            what,
            got,
            expected: n_sites,
        }));
    }
    checked_atoms(flat, n_sites).map_err(core)
}
