//! `fit_dictionary` and `fit_square`: fits with a Python callback for progress and interruption.

use numpy::PyArray1;
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::error::Result;
use crate::hierarchy::{Fit, FittedLevel, fit_below};
use crate::params::Params;
use crate::py::arrays::{self, Held};
use crate::py::encoding::codebook;
use crate::py::errors;
use crate::square::{self, SquareParams};
use crate::stage::{Record, Watcher};

/// Settings as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Settings {
    atoms: Vec<usize>,
    copies: bool,
    dictionary_size: f64,
    sparsity: f64,
    reconstruction: f64,
    max_iterations: usize,
    tolerance: f64,
    seed: u64,
    threads: usize,
}

impl From<Settings> for Params {
    fn from(from: Settings) -> Self {
        Self {
            atoms: from.atoms,
            copies: from.copies,
            dictionary_size: from.dictionary_size,
            sparsity: from.sparsity,
            reconstruction: from.reconstruction,
            max_iterations: from.max_iterations,
            tolerance: from.tolerance,
            seed: from.seed,
            threads: from.threads,
        }
    }
}

/// Settings of the squared-error fit as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct SquareSettings {
    atoms: Vec<usize>,
    copies: bool,
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
            copies: from.copies,
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

/// Atoms and the largest code of each, as Python passes them.
type Start<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Fits levels of atoms to sparse rows; `watch` is called with each history record.
#[pyfunction]
#[pyo3(signature = (rows, n_sites, settings, watch, start=None))]
pub(crate) fn fit_dictionary<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    settings: Settings,
    watch: &Bound<'py, PyAny>,
    start: Option<Start<'py>>,
) -> PyResult<Bound<'py, PyDict>> {
    let rows = Held::new(rows)?.rows(n_sites)?;
    let params = Params::from(settings).check();
    let params = params.map_err(|error| errors::to_python(py, &error))?;
    let start = match start {
        Some((atoms, peak)) => {
            Some(codebook(&atoms, &peak, params.sparsity / params.reconstruction)?.0)
        }
        None => None,
    };
    watched(watch, n_sites, |told| fit_below(rows, &params, start, told))
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
    let held = Held::new(rows)?;
    let sheet = held.sheet(n_sites)?;
    let params = SquareParams::from(settings).check();
    let params = params.map_err(|error| errors::to_python(py, &error))?;
    watched(watch, n_sites, |told| {
        square::fit_square(sheet, &params, told)
    })
}

/// What a fit found, while `watch` is called with each record.
fn watched<'py>(
    watch: &Bound<'py, PyAny>,
    n_sites: usize,
    fit: impl FnOnce(&mut Watcher) -> Result<Fit> + Send,
) -> PyResult<Bound<'py, PyDict>> {
    let py = watch.py();
    let watch = watch.clone().unbind();
    let mut failure = None;
    let result = py.detach(|| {
        fit(&mut |record: &Record| match tell(&watch, record) {
            Ok(go_on) => go_on,
            Err(error) => {
                failure = Some(error);
                false
            }
        })
    });
    if let Some(error) = failure {
        return Err(error);
    }
    plain(
        py,
        &result.map_err(|error| errors::to_python(py, &error))?,
        n_sites,
    )
}

/// Shows a record; false when the user has pressed Ctrl-C.
fn tell(watch: &Py<PyAny>, record: &Record) -> PyResult<bool> {
    Python::attach(|py| {
        let told = watch
            .call1(py, (row(py, record)?,))
            .and_then(|_| py.check_signals());
        match told {
            Err(error) if error.is_instance_of::<PyKeyboardInterrupt>(py) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => Ok(true),
        }
    })
}

fn row<'py>(py: Python<'py>, record: &Record) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("stage", &record.stage)?;
    out.set_item("iteration", record.iteration)?;
    out.set_item("dictionary_size", record.terms.dictionary_size)?;
    out.set_item("sparsity", record.terms.sparsity)?;
    out.set_item("reconstruction", record.terms.reconstruction)?;
    out.set_item("total", record.terms.total)?;
    out.set_item("live", record.live)?;
    Ok(out)
}

/// What a fit found, as a dictionary.
fn plain<'py>(py: Python<'py>, fit: &Fit, n_sites: usize) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let history = fit.history.iter().map(|record| row(py, record));
    out.set_item(
        "history",
        PyList::new(py, history.collect::<PyResult<Vec<_>>>()?)?,
    )?;
    out.set_item("stop_reason", fit.stop.words())?;
    let levels = fit
        .levels
        .iter()
        .map(|level| plain_level(py, level, n_sites));
    out.set_item(
        "levels",
        PyList::new(py, levels.collect::<PyResult<Vec<_>>>()?)?,
    )?;
    Ok(out)
}

fn plain_level<'py>(
    py: Python<'py>,
    level: &FittedLevel,
    n_sites: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("atoms", arrays::dense(py, &level.atoms, n_sites)?)?;
    out.set_item("usage", PyArray1::from_slice(py, &level.usage))?;
    out.set_item("peak", PyArray1::from_slice(py, &level.peak))?;
    let (indptr, atom, value) = arrays::compressed(py, &level.codes);
    out.set_item("indptr", indptr)?;
    out.set_item("atom", atom)?;
    out.set_item("value", value)?;
    Ok(out)
}
