//! Numpy arrays in and out; messages name the argument.

use numpy::{
    Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::py::errors;
use crate::rows::{Entry, Rows};

/// The values of a contiguous array of one type and dimension.
pub(crate) fn view<'a, T: Element>(
    array: &'a PyReadonlyArrayDyn<'_, T>,
    name: &str,
    dimension: usize,
) -> PyResult<&'a [T]> {
    let shape = array.shape();
    if shape.len() != dimension {
        let message = format!("{name} has shape {shape:?}; pass an array with {dimension} axes");
        return Err(shape_error(array.py(), message));
    }
    // A slice alone would accept Fortran order too.
    match array.as_slice() {
        Ok(slice) if array.is_c_contiguous() => Ok(slice),
        _ => {
            let message =
                format!("{name} is not C-contiguous; pass numpy.ascontiguousarray({name})");
            Err(shape_error(array.py(), message))
        }
    }
}

/// An array argument of the right type, or an error that names it.
pub(crate) fn array<'py, T: Element>(
    argument: &Bound<'py, PyAny>,
    name: &str,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    argument.extract().map_err(|_| {
        let py = argument.py();
        let expected = numpy::dtype::<T>(py);
        let got = match argument.getattr("dtype") {
            Ok(dtype) => dtype.to_string(),
            Err(_) => format!(
                "a {}",
                argument
                    .get_type()
                    .name()
                    .map_or_else(|_| "?".into(), |n| n.to_string())
            ),
        };
        shape_error(
            py,
            format!("{name} is {got}; pass a numpy array of {expected}"),
        )
    })
}

/// Pointers, sites and values of sparse rows.
type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Checked rows from a tuple of pointers, sites and values.
pub(crate) fn rows(rows: &Bound<PyTuple>, n_sites: usize) -> PyResult<Rows> {
    let (indptr, sites, values): Arrays = rows.extract()?;
    let pointers = array::<i64>(&indptr, "indptr")?;
    let sites = array::<u32>(&sites, "sites")?;
    let values = array::<f32>(&values, "values")?;
    let pointers_view = view(&pointers, "indptr", 1)?;
    let sites_view = view(&sites, "sites", 1)?;
    let values_view = view(&values, "values", 1)?;
    Rows::new(pointers_view, sites_view, values_view, n_sites)
        .map_err(|error| errors::to_python(rows.py(), &error))
}

fn shape_error(py: Python, message: String) -> PyErr {
    let class = py
        .import("moecollab.errors")
        .and_then(|module| module.getattr("ShapeError"));
    match class.and_then(|class| class.call1((message,))) {
        Ok(error) => PyErr::from_value(error),
        Err(failure) => failure,
    }
}

/// Sparse lists as a dense float32 array (`lists.len()`, `width`).
pub(crate) fn dense<'py>(
    py: Python<'py>,
    lists: &[Vec<Entry>],
    width: usize,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let mut flat = vec![0.0_f32; lists.len() * width];
    for (row, list) in lists.iter().enumerate() {
        for entry in list {
            flat[row * width + entry.index as usize] = entry.value;
        }
    }
    PyArray1::from_vec(py, flat).reshape([lists.len(), width])
}

/// Compressed arrays: pointers, indices, values.
pub(crate) type Compressed<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<f32>>,
);

/// Sparse lists as compressed arrays.
pub(crate) fn compressed<'py>(py: Python<'py>, lists: &[Vec<Entry>]) -> Compressed<'py> {
    let mut pointers = vec![0_i64];
    let mut sum = 0;
    for list in lists {
        sum += list.len() as i64;
        pointers.push(sum);
    }
    let entries = || lists.iter().flatten();
    (
        PyArray1::from_vec(py, pointers),
        PyArray1::from_iter(py, entries().map(|entry| entry.index)),
        PyArray1::from_iter(py, entries().map(|entry| entry.value)),
    )
}
