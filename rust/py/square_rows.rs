//! Sparse rows of the squared-error engine as they enter.

use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::Error;
use crate::py::{arrays, errors};
use crate::square::{Draft, Matrix, Sheet, checked_atoms};

/// The arrays of sparse rows, kept from changing while Rust reads them.
pub(crate) struct Held<'py> {
    py: Python<'py>,
    starts: numpy::PyReadonlyArrayDyn<'py, i64>,
    sites: numpy::PyReadonlyArrayDyn<'py, u32>,
    values: numpy::PyReadonlyArrayDyn<'py, f32>,
}

impl<'py> Held<'py> {
    /// Arrays of the right types.
    pub fn new(rows: &Bound<'py, PyTuple>) -> PyResult<Self> {
        type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);
        let (starts, sites, values): Arrays = rows.extract()?;
        Ok(Self {
            py: rows.py(),
            starts: arrays::array(&starts, "indptr")?,
            sites: arrays::array(&sites, "sites")?,
            values: arrays::array(&values, "values")?,
        })
    }

    /// The rows, their entries not yet checked.
    pub fn draft(&self, n_sites: usize) -> PyResult<Draft<'_>> {
        let starts = arrays::view(&self.starts, "indptr", 1)?;
        let sites = arrays::view(&self.sites, "sites", 1)?;
        let values = arrays::view(&self.values, "values", 1)?;
        Draft::new(starts, sites, values, n_sites)
            .map_err(|error| errors::to_python(self.py, &error))
    }

    /// The rows, checked.
    pub fn sheet(&self, n_sites: usize) -> PyResult<Sheet<'_>> {
        let checked = self.draft(n_sites)?.sheet();
        checked.map_err(|error| errors::to_python(self.py, &error))
    }
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
