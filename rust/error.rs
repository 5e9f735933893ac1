//! Everything that can go wrong, one variant per cause, with its numbers.

use thiserror::Error as ThisError;

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in the core.
#[derive(Debug, Clone, PartialEq, ThisError)]
pub enum Error {
    /// A parameter is out of range.
    #[error("{name} is {got}; it must be {allowed}")]
    Setting {
        /// Name of the parameter.
        name: &'static str,
        /// What was given.
        got: String,
        /// What is allowed.
        allowed: String,
    },
    /// Two arrays that belong together do not fit.
    #[error("{what} has length {got}, expected {expected}; pass arrays that belong together")]
    Length {
        /// Name of the array.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it should have.
        expected: usize,
    },
    /// An array holds a value it may not hold.
    #[error("{what} holds {got} at position {position}; it must be {allowed}")]
    Value {
        /// Name of the array.
        what: &'static str,
        /// The value.
        got: String,
        /// Where it stands.
        position: usize,
        /// What is allowed.
        allowed: &'static str,
    },
    /// There are no rows or no sites.
    #[error("{what} is empty; record some text first")]
    Empty {
        /// Name of the array.
        what: &'static str,
    },
    /// The threads could not be started.
    #[error("the worker threads could not be started: {0}; ask for fewer threads")]
    Threads(String),
}
