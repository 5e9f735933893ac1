//! Arithmetic core of `moecollab`: hierarchical sparse dictionary learning of expert activations
//! and the ranking of experts by their contribution to what was learned.
//!
//! Nothing here knows Python except `py`. All results are the same for any number of threads.

#![deny(missing_docs)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "ids are checked to fit u32 when rows enter; counts are far below 2^52"
)]
#![allow(clippy::similar_names, reason = "plain short words are often alike")]

mod caps;
mod checks;
mod coding;
mod contribution;
mod coverage;
mod dictionary;
mod encoding;
mod error;
mod hierarchy;
mod joint;
mod level;
mod median;
mod mining;
mod moves;
mod objective;
mod parallel;
mod params;
mod pieces;
mod rng;
mod rows;
mod search;
mod seeding;
mod single;
mod stage;
mod start;
mod step;
mod update;

#[cfg_attr(
    not(feature = "python"),
    allow(dead_code, reason = "only Python opens this room")
)]
mod election;
#[cfg(test)]
mod fuzz;
#[cfg_attr(
    not(feature = "python"),
    allow(dead_code, reason = "only Python opens this room")
)]
mod outputs;
#[cfg_attr(
    not(feature = "python"),
    allow(dead_code, unused_imports, reason = "only Python opens this room")
)]
mod square;

#[cfg(feature = "python")]
mod py;

pub use contribution::{Ranking, rank_contributions};
pub use coverage::{Departures, coverage_order};
pub use encoding::Codebook;
pub use error::{Error, Result};
pub use hierarchy::{Fit, FittedLevel, fit, fit_below};
pub use mining::{Baskets, MinedSets, MiningParams, Watch, count_sets, mine_sets};
pub use objective::Terms;
pub use params::{Params, ValidParams};
pub use rows::{Entry, Rows};
pub use stage::{Record, StopReason};
pub use step::{Given, step_atoms};
