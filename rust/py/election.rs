//! `ranked_choice_falls`: ranked-choice voting over the ballots of tokens.

use numpy::{PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::election;
use crate::py::{arrays, errors};

/// The order in which candidates fall.
#[pyfunction]
pub(crate) fn ranked_choice_falls<'py>(
    py: Python<'py>,
    ballots: &Bound<'py, PyAny>,
    n_votes: usize,
    n_candidates: usize,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let ballots = arrays::array::<u16>(ballots, "ballots")?;
    let places = arrays::view(&ballots, "ballots", 2)?;
    let width = ballots.shape()[1];
    let gone = py
        .detach(|| election::falls(places, width, n_votes, n_candidates))
        .map_err(|error| errors::to_python(py, &error))?;
    Ok(PyArray1::from_vec(py, gone))
}
