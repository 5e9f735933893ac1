//! `mine_sets`, `count_sets`: exhaustive mining with a Python callback.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::Result;
use crate::mining::{self, MinedSets, MiningParams};
use crate::py::arrays::{self, Held};
use crate::py::errors;

/// Settings as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Settings {
    n_experts: usize,
    size: usize,
    least: u32,
    top: usize,
    by_lift: bool,
    chance: bool,
    threads: usize,
}

impl From<Settings> for MiningParams {
    fn from(from: Settings) -> Self {
        Self {
            n_experts: from.n_experts,
            size: from.size,
            least: from.least,
            top: from.top,
            by_lift: from.by_lift,
            chance: from.chance,
            threads: from.threads,
        }
    }
}

/// Strata, one number per row, if there are any.
type Numbers<'py> = Option<PyReadonlyArrayDyn<'py, u32>>;

fn numbers<'py>(strata: Option<&Bound<'py, PyAny>>) -> PyResult<Numbers<'py>> {
    strata
        .map(|given| arrays::array(given, "strata"))
        .transpose()
}

fn numbers_view<'a>(strata: &'a Numbers) -> PyResult<Option<&'a [u32]>> {
    let view = |given| arrays::view(given, "strata", 1);
    strata.as_ref().map(view).transpose()
}

/// Runs with the interpreter released; `watch` is called with stage and share and may raise.
fn run<T: Send>(
    watch: &Bound<PyAny>,
    work: impl Send + FnOnce(&mut mining::Watch) -> Result<Option<T>>,
) -> PyResult<T> {
    let py = watch.py();
    let callback = watch.clone().unbind();
    let mut failure = None;
    let result = py.detach(|| {
        work(&mut |stage, share| {
            let told = Python::attach(|py| {
                callback.call1(py, (stage, share))?;
                py.check_signals()
            });
            failure = told.err();
            failure.is_none()
        })
    });
    let found = result.map_err(|error| errors::to_python(py, &error))?;
    let stopped = || pyo3::exceptions::PyKeyboardInterrupt::new_err(());
    found.ok_or_else(|| failure.unwrap_or_else(stopped))
}

/// The best sets of sites, how many have each count, and what chance gives.
///
/// `watch` is called with stage and share.
#[pyfunction]
pub(crate) fn mine_sets<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    strata: Option<&Bound<'py, PyAny>>,
    settings: Settings,
    watch: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyDict>> {
    let rows = Held::new(rows)?;
    let baskets = rows.baskets(n_sites)?;
    let strata = numbers(strata)?;
    let (strata, params) = (numbers_view(&strata)?, MiningParams::from(settings));
    let found = run(watch, |watch| {
        mining::mine_sets(&baskets, strata, &params, watch)
    })?;
    plain(py, found, params.size)
}

fn plain(py: Python<'_>, found: MinedSets, size: usize) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    let shape = [found.count.len(), size];
    out.set_item("site", PyArray1::from_vec(py, found.site).reshape(shape)?)?;
    out.set_item("count", PyArray1::from_vec(py, found.count))?;
    out.set_item("load", PyArray1::from_vec(py, found.load))?;
    let histogram = found.histogram.into_iter().map(|sets| sets as i64);
    out.set_item("lift", PyArray1::from_vec(py, found.lift))?;
    out.set_item("histogram", PyArray1::from_iter(py, histogram))?;
    out.set_item("expected", PyArray1::from_vec(py, found.expected))?;
    out.set_item("variance", PyArray1::from_vec(py, found.variance))?;
    out.set_item("log10_p", PyArray1::from_vec(py, found.log10_p))?;
    out.set_item("q", PyArray1::from_vec(py, found.q))?;
    Ok(out)
}

/// How many rows hold all sites of each set.
#[pyfunction]
pub(crate) fn count_sets<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    sets: &Bound<'py, PyAny>,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let rows = Held::new(rows)?;
    let baskets = rows.baskets(n_sites)?;
    let sets = arrays::array::<u32>(sets, "sets")?;
    let view = arrays::view(&sets, "sets", 2)?;
    let size = sets.shape()[1];
    let counts = py.detach(|| mining::count_sets(&baskets, view, size, threads));
    let counts = counts.map_err(|error| errors::to_python(py, &error))?;
    Ok(PyArray1::from_vec(py, counts))
}
