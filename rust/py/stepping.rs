//! `step_atoms`, `sum_square`, `step_square`: dictionary steps for fits block by block.

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::Error;
use crate::py::arrays::{self, Held};
use crate::py::errors;
use crate::rows::{Lists, Rows};
use crate::square::{self, Codes, Matrix};
use crate::step::{self, Given, check_weights};

/// Better atoms for rows whose codes stay, under absolute errors.
#[pyfunction]
pub(crate) fn step_atoms<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    weight: &Bound<'py, PyAny>,
    atoms: &Bound<'py, PyAny>,
    codes: &Bound<'py, PyTuple>,
    threads: usize,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (atoms, n_sites) = unit_atoms(atoms)?;
    let given = Given {
        rows: Held::new(rows)?.rows(n_sites)?,
        weight: arrays::vector(weight, "weight")?,
        codes: Held::new(codes)?.rows(atoms.len())?,
        atoms,
    };
    let found = py.detach(|| step::step_atoms(given, threads));
    let found = found.map_err(|error| errors::to_python(py, &error))?;
    arrays::dense(py, &found, n_sites)
}

/// What rows with given codes add to the sums that atoms follow under squared error.
#[pyfunction]
pub(crate) fn sum_square<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    weight: &Bound<'py, PyAny>,
    atoms: &Bound<'py, PyAny>,
    codes: &Bound<'py, PyTuple>,
    threads: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let core = |error| errors::to_python(py, &error);
    let n_sites = width(atoms)?;
    let atoms = crate::py::square::atoms(atoms, n_sites)?;
    let held = Held::new(rows)?;
    let sheet = held.sheet(n_sites)?;
    let weight = arrays::vector(weight, "weight")?;
    check_weights("weight", &weight, sheet.len()).map_err(core)?;
    let codes = flat(&Held::new(codes)?.rows(atoms.n_rows())?);
    let share = py
        .detach(|| square::share(sheet, weight, atoms, codes, threads))
        .map_err(core)?;
    let out = PyDict::new(py);
    out.set_item("second", shaped(py, &share.second)?)?;
    out.set_item("pull", shaped(py, &share.pull)?)?;
    out.set_item("cost", PyArray1::from_slice(py, &share.cost))?;
    Ok(out)
}

/// Better atoms for such sums.
#[pyfunction]
pub(crate) fn step_square<'py>(
    py: Python<'py>,
    atoms: &Bound<'py, PyAny>,
    second: &Bound<'py, PyAny>,
    pull: &Bound<'py, PyAny>,
    sweeps: usize,
    threads: usize,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let n_sites = width(atoms)?;
    let atoms = crate::py::square::atoms(atoms, n_sites)?;
    let second = sums(second, "second", (atoms.n_rows(), atoms.n_rows()))?;
    let pull = sums(pull, "pull", (atoms.n_rows(), n_sites))?;
    let found = py.detach(|| square::step_atoms(atoms, second, pull, sweeps, threads));
    shaped(py, &found.map_err(|error| errors::to_python(py, &error))?)
}

fn width(atoms: &Bound<PyAny>) -> PyResult<usize> {
    let array = arrays::array::<f32>(atoms, "atoms")?;
    arrays::view(&array, "atoms", 2)?;
    Ok(array.shape()[1])
}

/// Atoms in [0, 1] as lists, and their number of sites.
fn unit_atoms(argument: &Bound<PyAny>) -> PyResult<(Lists, usize)> {
    let array = arrays::array::<f32>(argument, "atoms")?;
    let flat = arrays::view(&array, "atoms", 2)?;
    let n_sites = array.shape()[1];
    let lists = crate::encoding::unit_atoms(flat, n_sites);
    let lists = lists.map_err(|error| errors::to_python(argument.py(), &error))?;
    Ok((lists, n_sites))
}

/// A matrix of finite values of a known shape.
fn sums(argument: &Bound<PyAny>, name: &'static str, shape: (usize, usize)) -> PyResult<Matrix> {
    let core = |error| errors::to_python(argument.py(), &error);
    let array = arrays::array::<f32>(argument, name)?;
    let flat = arrays::view(&array, name, 2)?;
    let (got, expected) = (flat.len(), shape.0 * shape.1);
    if got != expected || array.shape()[1] != shape.1 {
        return Err(core(Error::Length {
            what: name,
            got,
            expected,
        }));
    }
    match flat.iter().position(|value| !value.is_finite()) {
        None => Ok(Matrix::from_flat(flat, shape.1)),
        Some(position) => Err(core(Error::Value {
            what: name,
            got: flat[position].to_string(),
            position,
            allowed: "finite",
        })),
    }
}

fn flat(rows: &Rows) -> Codes {
    let mut codes = Codes::new();
    for row in 0..rows.len() {
        codes
            .atoms
            .extend(rows.row(row).iter().map(|entry| entry.index));
        codes
            .values
            .extend(rows.row(row).iter().map(|entry| entry.value));
        codes.starts.push(codes.atoms.len() as i64);
    }
    codes
}

fn shaped<'py>(py: Python<'py>, matrix: &Matrix) -> PyResult<Bound<'py, PyArray2<f32>>> {
    PyArray1::from_vec(py, matrix.flat()).reshape([matrix.n_rows(), matrix.width()])
}
