//! `fit_square`: the squared-error fit with a Python callback, like `fit_dictionary`.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::py::errors;
use crate::py::fitting::{plain, tell};
use crate::py::square_rows::Held;
use crate::square::{SquareParams, fit_square as fit};
use crate::stage::Record;

/// Settings as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct SquareSettings {
    atoms: Vec<usize>,
    dictionary_size: f64,
    sparsity: f64,
    reconstruction: f64,
    passes: f64,
    batch: usize,
    max_iterations: usize,
    tolerance: f64,
    seed: u64,
    threads: usize,
}

impl From<SquareSettings> for SquareParams {
    fn from(from: SquareSettings) -> Self {
        Self {
            atoms: from.atoms,
            dictionary_size: from.dictionary_size,
            sparsity: from.sparsity,
            reconstruction: from.reconstruction,
            passes: from.passes,
            batch: from.batch,
            max_iterations: from.max_iterations,
            tolerance: from.tolerance,
            seed: from.seed,
            threads: from.threads,
        }
    }
}

/// Fits levels of atoms under squared error; `watch` is called with each history record.
#[pyfunction]
pub(crate) fn fit_square<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    settings: SquareSettings,
    watch: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyDict>> {
    let core = |error| errors::to_python(py, &error);
    let held = Held::new(rows)?;
    let sheet = held.sheet(n_sites)?;
    let params = SquareParams::from(settings).check().map_err(core)?;
    let watch = watch.clone().unbind();
    let mut failure = None;
    let result = py.detach(|| {
        let mut told = |record: &Record| match tell(&watch, record) {
            Ok(go_on) => go_on,
            Err(error) => {
                failure = Some(error);
                false
            }
        };
        fit(sheet, &params, &mut told)
    });
    match failure {
        Some(error) => Err(error),
        None => plain(py, &result.map_err(core)?, n_sites),
    }
}
