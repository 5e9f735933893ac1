//! The Python module `_core`: arrays in, plain dictionaries of arrays out.

mod arrays;
mod coverage;
mod election;
mod encoding;
mod errors;
mod fitting;
mod mining;
mod outputs;
mod square;
mod square_learning;
mod stepping;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::contribution::rank_contributions;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::caep_ranking;
    #[pymodule_export]
    use super::coverage::coverage_order;
    #[pymodule_export]
    use super::election::ranked_choice_falls;
    #[pymodule_export]
    use super::encoding::encode;
    #[pymodule_export]
    use super::fitting::{fit_dictionary, fit_square};
    #[pymodule_export]
    use super::mining::{count_sets, mine_sets};
    #[pymodule_export]
    use super::outputs::read_outputs;

    #[pymodule_export]
    use super::square::encode_square;
    #[pymodule_export]
    use super::square_learning::learn_square;
    #[pymodule_export]
    use super::stepping::{step_atoms, step_square, sum_square};
}

/// When each site falls in CAEP's loop, and what it contributed just before.
#[pyfunction]
fn caep_ranking<'py>(
    py: Python<'py>,
    atoms: &Bound<'py, PyAny>,
    usage: &Bound<'py, PyAny>,
    peak: &Bound<'py, PyAny>,
    threshold_fraction: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let atoms = arrays::array::<f32>(atoms, "atoms")?;
    let usage = arrays::array::<f64>(usage, "usage")?;
    let peak = arrays::array::<f64>(peak, "peak")?;
    let usage_view = arrays::view(&usage, "usage", 1)?;
    let peak_view = arrays::view(&peak, "peak", 1)?;
    let atoms_view = arrays::view(&atoms, "atoms", 2)?;
    let ranking = py
        .detach(|| rank_contributions(atoms_view, usage_view, peak_view, threshold_fraction))
        .map_err(|error| errors::to_python(py, &error))?;
    let out = PyDict::new(py);
    out.set_item("step", PyArray1::from_vec(py, ranking.step))?;
    out.set_item("contribution", PyArray1::from_vec(py, ranking.contribution))?;
    Ok(out)
}
