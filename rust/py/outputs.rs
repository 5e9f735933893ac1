//! `read_outputs`: norms, peaks and channel sums of expert outputs.

use numpy::{PyArray1, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::outputs::{Order, Values, read};
use crate::parallel::Pool;
use crate::py::arrays;
use crate::py::errors;

/// Readings of the slots of an order, in that order.
#[pyfunction]
pub(crate) fn read_outputs<'py>(
    py: Python<'py>,
    values: &Bound<'py, PyAny>,
    slots: &Bound<'py, PyAny>,
    starts: &Bound<'py, PyAny>,
    sums: Option<PyReadwriteArrayDyn<'py, f64>>,
    threads: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let core = |error| errors::to_python(py, &error);
    let (single, brain);
    let (values, width) = if let Ok(array) = arrays::array::<u16>(values, "values") {
        brain = array;
        (
            Values::Brain(arrays::view(&brain, "values", 2)?),
            brain.shape()[1],
        )
    } else {
        single = arrays::array::<f32>(values, "values")?;
        (
            Values::Single(arrays::view(&single, "values", 2)?),
            single.shape()[1],
        )
    };
    let (slots, starts) = (
        arrays::array::<i64>(slots, "slots")?,
        arrays::array::<i64>(starts, "starts")?,
    );
    let order = Order {
        slots: arrays::view(&slots, "slots", 1)?,
        starts: arrays::view(&starts, "starts", 1)?,
    };
    let mut sums = sums;
    let sums = sums.as_mut().map(|sums| sums.as_slice_mut()).transpose()?;
    let pool = Pool::new(threads).map_err(core)?;
    let found = py
        .detach(|| read(values, width, order, sums, &pool))
        .map_err(core)?;
    let out = PyDict::new(py);
    out.set_item(
        "norm",
        PyArray1::from_iter(py, found.iter().map(|one| one.norm)),
    )?;
    out.set_item(
        "peak",
        PyArray1::from_iter(py, found.iter().map(|one| one.peak)),
    )?;
    out.set_item(
        "channel",
        PyArray1::from_iter(py, found.iter().map(|one| one.channel)),
    )?;
    Ok(out)
}
