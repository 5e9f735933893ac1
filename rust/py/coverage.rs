//! `coverage_order`: in which order sites go without rows losing much.

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::coverage;
use crate::py::arrays::{self, Held};
use crate::py::errors;

/// The order in which sites go, and the damage that each adds then.
#[pyfunction]
pub(crate) fn coverage_order<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    weight: &Bound<'py, PyAny>,
    power: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let rows = Held::new(rows)?.rows(n_sites)?;
    let weight = arrays::vector(weight, "weight")?;
    let found = py
        .detach(|| coverage::coverage_order(rows, &weight, power))
        .map_err(|error| errors::to_python(py, &error))?;
    let out = PyDict::new(py);
    out.set_item("order", PyArray1::from_vec(py, found.order))?;
    out.set_item("damage", PyArray1::from_vec(py, found.damage))?;
    Ok(out)
}
