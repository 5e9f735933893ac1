//! The squared-error variant: non-negative sparse coding and dictionary learning from sums.
//!
//! Rows c with weight w (1/N unless given), atoms d >= 0 with Euclidean norm at most 1, codes r >= 0:
//!
//! ```text
//! L = s sum_i max_c R[c,i] + sum_c w_c ( lambda1 sum_i R[c,i] + lambda2/2 |x_c - sum_i R[c,i] d_i|^2 )
//! ```
//!
//! With s = 0 it is plain non-negative sparse coding (Mairal et al. 2010). The rows enter the
//! dictionary step only through A = sum R'R and B = sum R'X, kept as A and U = B - A D.

#![allow(
    clippy::inline_always,
    reason = "vector instructions reach only what is inlined into a dispatched function"
)]

mod caps;
mod coder;
mod correlate;
mod drop;
mod encode;
mod fit;
#[cfg(test)]
mod fuzz;
mod gap;
mod learner;
mod level;
mod matrix;
mod order;
mod panels;
mod params;
mod product;
mod replace;
mod seeding;
mod sheet;
mod slot;
mod statistics;
mod step;
mod thin;
mod update;

pub(crate) use encode::{Codes, checked_atoms, encode};
pub(crate) use fit::fit_square;
pub(crate) use learner::{Learner, Running, State};
pub(crate) use matrix::Matrix;
pub(crate) use order::Order;
pub(crate) use params::{EncodeParams, LearnParams, SquareParams};
pub(crate) use sheet::{Draft, Sheet};
pub(crate) use step::{share, step_atoms};
