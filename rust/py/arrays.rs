//! Numpy arrays in and out; messages name the argument.

use numpy::{
    Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::Result;
use crate::mining::Baskets;
use crate::py::errors;
use crate::rows::{Entry, Rows};
use crate::square::{Draft, Sheet};

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

/// A copy of a contiguous array of float64 with one axis.
pub(crate) fn vector(argument: &Bound<PyAny>, name: &str) -> PyResult<Vec<f64>> {
    let array = array::<f64>(argument, name)?;
    Ok(view(&array, name, 1)?.to_vec())
}

/// The arrays of sparse rows, kept from changing while Rust reads them.
pub(crate) struct Held<'py> {
    py: Python<'py>,
    starts: PyReadonlyArrayDyn<'py, i64>,
    sites: PyReadonlyArrayDyn<'py, u32>,
    values: PyReadonlyArrayDyn<'py, f32>,
}

impl<'py> Held<'py> {
    /// Arrays of the right types: pointers, sites and values.
    pub fn new(rows: &Bound<'py, PyTuple>) -> PyResult<Self> {
        type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);
        let (starts, sites, values): Arrays = rows.extract()?;
        Ok(Self {
            py: rows.py(),
            starts: array(&starts, "indptr")?,
            sites: array(&sites, "sites")?,
            values: array(&values, "values")?,
        })
    }

    /// The rows of the squared-error engine, their entries not yet checked.
    pub fn draft(&self, n_sites: usize) -> PyResult<Draft<'_>> {
        self.checked(n_sites, Draft::new)
    }

    /// The rows of the squared-error engine, checked.
    pub fn sheet(&self, n_sites: usize) -> PyResult<Sheet<'_>> {
        self.checked(n_sites, Sheet::new)
    }

    /// A checked copy of the rows.
    pub fn rows(&self, n_sites: usize) -> PyResult<Rows> {
        self.checked(n_sites, Rows::new)
    }

    /// The rows as sets of sites, checked.
    pub fn baskets(&self, n_sites: usize) -> PyResult<Baskets<'_>> {
        self.checked(n_sites, Baskets::new)
    }

    fn checked<'a, T>(
        &'a self,
        n_sites: usize,
        check: impl FnOnce(&'a [i64], &'a [u32], &'a [f32], usize) -> Result<T>,
    ) -> PyResult<T> {
        let starts = view(&self.starts, "indptr", 1)?;
        let sites = view(&self.sites, "sites", 1)?;
        let values = view(&self.values, "values", 1)?;
        check(starts, sites, values, n_sites).map_err(|error| errors::to_python(self.py, &error))
    }
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
