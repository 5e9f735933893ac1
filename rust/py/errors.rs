//! Core errors as Python exceptions; the classes themselves are defined in `moecollab.errors`.

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::Error;

/// The one place where a core error becomes a Python exception.
pub(crate) fn to_python(py: Python, error: &Error) -> PyErr {
    let message = error.to_string();
    let (class, arguments) = match error {
        Error::Setting { name, got, allowed } => (
            "SettingsError",
            vec![(*name).to_owned(), got.clone(), allowed.clone()],
        ),
        Error::Threads(cause) => {
            let allowed = format!("a number of threads that can be started ({cause})");
            (
                "SettingsError",
                vec!["threads".to_owned(), "refused".to_owned(), allowed],
            )
        }
        Error::Length { .. } => ("ShapeError", vec![message]),
        Error::Value { .. } | Error::Empty { .. } => ("DataError", vec![message]),
    };
    raise(py, class, arguments).unwrap_or_else(|failure| failure)
}

fn raise(py: Python, class: &str, arguments: Vec<String>) -> PyResult<PyErr> {
    let class = py.import("moecollab.errors")?.getattr(class)?;
    Ok(PyErr::from_value(
        class.call1(PyTuple::new(py, arguments)?)?,
    ))
}
