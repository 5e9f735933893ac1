//! The only door to threads: ordered maps and sums that do not depend on how many there are.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Items per chunk of a reduction; fixed, so that sums are the same for any number of threads.
const CHUNK: usize = 512;

/// Most workers that may be asked for.
const MOST: usize = 1024;

/// A set of worker threads.
///
/// The caller's thread stays outside: signals are only seen there.
pub(crate) struct Pool(rayon::ThreadPool);

impl Pool {
    /// Starts `threads` workers, one per processor if 0.
    ///
    /// # Errors
    /// More than 1,024, which would take minutes to start; or the system has no more.
    pub fn new(threads: usize) -> Result<Self> {
        if threads > MOST {
            return Err(Error::Setting {
                name: "threads",
                got: threads.to_string(),
                allowed: format!("at most {MOST}"),
            });
        }
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        builder
            .build()
            .map(Self)
            .map_err(|cause| Error::Threads(cause.to_string()))
    }

    /// `each(desk, i)` for i in 0..n, in order; `desk` is scratch memory of one worker.
    pub fn map<D, T: Send>(
        &self,
        n: usize,
        desk: impl Fn() -> D + Sync + Send,
        each: impl Fn(&mut D, usize) -> T + Sync + Send,
    ) -> Vec<T> {
        if n < 2 {
            let mut desk = desk();
            return (0..n).map(|i| each(&mut desk, i)).collect();
        }
        let run = || (0..n).into_par_iter().map_init(&desk, &each).collect();
        self.0.install(run)
    }

    /// Runs everything inside on the workers, so that the calls within need no hand-over.
    pub fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        self.0.install(run)
    }

    /// `each(i, part)` for consecutive parts of `size` values; the last may be shorter.
    pub fn parts<T: Send>(
        &self,
        values: &mut [T],
        size: usize,
        each: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        if values.len() <= size || self.0.current_num_threads() == 1 {
            let parts = values.chunks_mut(size).enumerate();
            parts.for_each(|(i, part)| each(i, part));
        } else {
            let parts = values.par_chunks_mut(size).enumerate();
            self.0.install(|| parts.for_each(|(i, part)| each(i, part)));
        }
    }

    /// Sum of `each(desk, i)` over 0..n, by fixed chunks added in order.
    pub fn sum<D>(
        &self,
        n: usize,
        desk: impl Fn() -> D + Sync + Send,
        each: impl Fn(&mut D, usize) -> f64 + Sync + Send,
    ) -> f64 {
        let chunks = self.map(n.div_ceil(CHUNK), desk, |desk, chunk| {
            let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(n);
            range.map(|i| each(desk, i)).sum::<f64>()
        });
        chunks.into_iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_threads_are_refused() {
        assert!(matches!(
            Pool::new(6000),
            Err(Error::Setting {
                name: "threads",
                ..
            })
        ));
    }

    #[test]
    fn sums_do_not_depend_on_threads() {
        let sum = |threads| {
            let pool = Pool::new(threads).unwrap();
            pool.sum(10_001, || (), |(), i| 1.0 / (i as f64 + 0.3))
                .to_bits()
        };
        assert_eq!(sum(1), sum(2));
        assert_eq!(sum(1), sum(7));
    }
}
