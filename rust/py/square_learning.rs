//! `learn_square`: batches of the online learner, from a state to the next.

use numpy::{Element, PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::Error;
use crate::parallel::Pool;
use crate::py::arrays::{self, Held};
use crate::py::{errors, square};
use crate::square::{LearnParams, Learner, Matrix, Order, Running, State};

/// Learning settings as Python passes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct LearnSettings {
    batches: usize,
    batch: usize,
    window: usize,
    exponent: f64,
    share: f64,
    sparsity: f64,
    reconstruction: f64,
    tolerance: f64,
    seed: u64,
    threads: usize,
}

/// Atoms after some more batches of rows, with all that is needed to go on.
#[pyfunction]
#[allow(
    clippy::needless_pass_by_value,
    reason = "what Python passes is extracted"
)]
pub(crate) fn learn_square<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyTuple>,
    n_sites: usize,
    state: &Bound<'py, PyDict>,
    settings: LearnSettings,
) -> PyResult<Bound<'py, PyDict>> {
    let core = |error| errors::to_python(py, &error);
    let held = Held::new(rows)?;
    let sheet = held.sheet(n_sites)?;
    let (threads, batches) = (settings.threads, settings.batches);
    let schedule = LearnParams::from(settings)
        .check(sheet.len())
        .map_err(core)?;
    let state = entering(state, n_sites)?.check().map_err(core)?;
    let (state, running) = py
        .detach(|| {
            let pool = Pool::new(threads)?;
            let mut learner = Learner::new(state, schedule);
            let running = learner.learn(&sheet, batches, &pool);
            Ok((learner.into_state(), running))
        })
        .map_err(core)?;
    leaving(py, &state, &running)
}

impl From<LearnSettings> for LearnParams {
    fn from(from: LearnSettings) -> Self {
        Self {
            batch: from.batch,
            window: from.window,
            exponent: from.exponent,
            share: from.share,
            sparsity: from.sparsity,
            reconstruction: from.reconstruction,
            tolerance: from.tolerance,
            seed: from.seed,
        }
    }
}

/// A state from `atoms` alone, or from everything that [`learn_square`] returned.
fn entering(from: &Bound<PyDict>, n_sites: usize) -> PyResult<State> {
    let atoms = from.as_any().get_item("atoms")?;
    let mut state = State::new(square::atoms(&atoms, n_sites)?);
    if from.contains("pull")? {
        restore(&mut state, from)?;
    }
    Ok(state)
}

fn restore(state: &mut State, from: &Bound<PyDict>) -> PyResult<()> {
    let (n_atoms, n_sites) = (state.atoms.n_rows(), state.atoms.width());
    let sums = &mut state.sums;
    sums.second = Matrix::from_flat(&fitting(from, "second", 2, n_atoms * n_atoms)?, n_atoms);
    sums.pull = Matrix::from_flat(&fitting(from, "pull", 2, n_atoms * n_sites)?, n_sites);
    sums.first = fitting(from, "first", 1, n_atoms)?;
    let scales: Vec<f32> = fitting(from, "scales", 1, 2)?;
    (sums.mass, sums.weight) = (scales[0], scales[1]);
    let counts: Vec<u64> = fitting(from, "counts", 1, 4)?;
    (state.seen, state.exchanged) = (counts[0], counts[1]);
    state.order = Order::at(counts[2], counts[3] as usize);
    state.born = fitting(from, "born", 1, n_atoms)?;
    Ok(())
}

/// The values of one array of the state.
fn taken<T: Element + Copy>(from: &Bound<PyDict>, name: &str, axes: usize) -> PyResult<Vec<T>> {
    let item = from.as_any().get_item(name)?;
    let array = arrays::array::<T>(&item, name)?;
    Ok(arrays::view(&array, name, axes)?.to_vec())
}

/// The same, of a length that is known.
fn fitting<T: Element + Copy>(
    from: &Bound<PyDict>,
    name: &'static str,
    axes: usize,
    expected: usize,
) -> PyResult<Vec<T>> {
    let values = taken(from, name, axes)?;
    if values.len() == expected {
        return Ok(values);
    }
    let error = Error::Length {
        what: name,
        got: values.len(),
        expected,
    };
    Err(errors::to_python(from.py(), &error))
}

fn leaving<'py>(py: Python<'py>, state: &State, running: &Running) -> PyResult<Bound<'py, PyDict>> {
    let sums = &state.sums;
    let out = PyDict::new(py);
    for (name, matrix) in [
        ("atoms", &state.atoms),
        ("second", &sums.second),
        ("pull", &sums.pull),
    ] {
        let shape = [matrix.n_rows(), matrix.width()];
        out.set_item(name, PyArray1::from_vec(py, matrix.flat()).reshape(shape)?)?;
    }
    out.set_item("first", PyArray1::from_slice(py, &sums.first))?;
    out.set_item(
        "scales",
        PyArray1::from_slice(py, &[sums.mass, sums.weight]),
    )?;
    let counts = [
        state.seen,
        state.exchanged,
        state.order.pass,
        state.order.place as u64,
    ];
    out.set_item("counts", PyArray1::from_slice(py, &counts))?;
    out.set_item("born", PyArray1::from_slice(py, &state.born))?;
    let cost = [running.rows as f64, running.codes, running.error];
    out.set_item("running", PyArray1::from_slice(py, &cost))?;
    Ok(out)
}
