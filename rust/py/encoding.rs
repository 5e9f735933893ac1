//! `encode`: codes of rows on fixed atoms.

use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::encoding::Codebook;
use crate::py::arrays::{self, Compressed, Held};
use crate::py::errors;

/// Codes of sparse rows on fixed atoms, as compressed rows.
#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    atoms: &Bound<'py, PyAny>,
    peak: &Bound<'py, PyAny>,
    ratio: f64,
    threads: usize,
) -> PyResult<Compressed<'py>> {
    let core = |error| errors::to_python(py, &error);
    let (book, n_sites) = codebook(atoms, peak, ratio)?;
    let rows = Held::new(rows)?.rows(n_sites)?;
    let codes = py.detach(|| book.encode(&rows, threads)).map_err(core)?;
    Ok(arrays::compressed(py, &codes))
}

/// Atoms (`n_atoms`, `n_sites`) with the largest code of each, checked; and the number of sites.
pub(crate) fn codebook(
    atoms: &Bound<PyAny>,
    peak: &Bound<PyAny>,
    ratio: f64,
) -> PyResult<(Codebook, usize)> {
    let py = atoms.py();
    let atoms = arrays::array::<f32>(atoms, "atoms")?;
    let peak = arrays::array::<f32>(peak, "peak")?;
    let flat = arrays::view(&atoms, "atoms", 2)?;
    let caps = arrays::view(&peak, "peak", 1)?;
    let n_sites = atoms.shape()[1];
    let book = Codebook::new(flat, caps, n_sites, ratio);
    Ok((
        book.map_err(|error| errors::to_python(py, &error))?,
        n_sites,
    ))
}
