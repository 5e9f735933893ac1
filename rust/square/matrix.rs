//! Dense float32 rows on cache-line boundaries, padded to whole vectors.

/// Values of one cache line; row strides are multiples of it.
pub(crate) const LINE: usize = 16;

/// `n` rounded up to whole cache lines.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LINE)
}

/// Float32 values that begin on a cache line, so that no vector load straddles two.
#[derive(Debug)]
pub(crate) struct Aligned {
    data: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` times the same value.
    pub fn filled(len: usize, value: f32) -> Self {
        let data = vec![value; len + LINE];
        let start = data
            .as_ptr()
            .align_offset(LINE * size_of::<f32>())
            .min(LINE);
        Self { data, start, len }
    }
}

impl Clone for Aligned {
    fn clone(&self) -> Self {
        let mut copy = Self::filled(self.len, 0.0);
        copy.copy_from_slice(self);
        copy
    }
}

impl std::ops::Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..self.start + self.len]
    }
}

/// Rows of one width; what pads a row is zero and stays so.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    data: Aligned,
    n_rows: usize,
    width: usize,
    stride: usize,
}

impl Matrix {
    /// Zeros of shape (`n_rows`, `width`).
    pub fn zeros(n_rows: usize, width: usize) -> Self {
        let stride = padded(width);
        Self {
            data: Aligned::filled(n_rows * stride, 0.0),
            n_rows,
            width,
            stride,
        }
    }

    /// The same values as a flat C-contiguous array of rows.
    pub fn from_flat(flat: &[f32], width: usize) -> Self {
        let mut matrix = Self::zeros(flat.len() / width.max(1), width);
        for (row, values) in flat.chunks_exact(width.max(1)).enumerate() {
            matrix.row_mut(row)[..width].copy_from_slice(values);
        }
        matrix
    }

    /// Without the padding, flat and C-contiguous.
    pub fn flat(&self) -> Vec<f32> {
        let rows = (0..self.n_rows).flat_map(|row| &self.row(row)[..self.width]);
        rows.copied().collect()
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Values of a row, without padding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// One row with its padding.
    #[inline]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..(row + 1) * self.stride]
    }

    /// One row with its padding, to be changed.
    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let stride = self.stride;
        &mut self.data[row * stride..(row + 1) * stride]
    }

    /// All rows with their padding.
    #[inline]
    pub fn all(&self) -> &[f32] {
        &self.data
    }

    /// All rows with their padding, to be changed.
    #[inline]
    pub fn all_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_begin_on_cache_lines() {
        let flat: Vec<f32> = (0..21).map(|i| i as f32).collect();
        let matrix = Matrix::from_flat(&flat, 7).clone();
        assert_eq!(
            (matrix.n_rows(), matrix.width(), matrix.stride()),
            (3, 7, 16)
        );
        assert_eq!(matrix.row(2).as_ptr().align_offset(64), 0);
        assert_eq!(
            matrix.row(1)[..8],
            [7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 0.0]
        );
        assert_eq!(matrix.flat(), flat);
    }
}
