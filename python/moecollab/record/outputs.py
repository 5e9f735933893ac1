"""Reading expert outputs where the model computed them: norms, peaks and sums by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab._core import read_outputs

_CHUNK = 4096


@dataclass(frozen=True)
class Readings:
    """What is known of slots, (n_slots,) each; zeros where nothing was read.

    Parameters
    ----------
    norm : float32 Tensor
        Euclidean norm of the output.
    peak : float32 Tensor
        Largest magnitude of its entries.
    channel : int32 Tensor
        The first channel that has it.
    """

    norm: Tensor
    peak: Tensor
    channel: Tensor

    @classmethod
    def zeros(cls, n_slots: int) -> Readings:
        """Readings of nothing."""
        return cls(
            torch.zeros(n_slots), torch.zeros(n_slots), torch.zeros(n_slots, dtype=torch.int32)
        )


class OutputReader:
    """Reads outputs of one layer's experts, and adds them up by channel if asked to.

    Parameters
    ----------
    n_sites : int
        Experts times domains.
    channels : bool
        Whether to sum by channel.
    """

    def __init__(self, n_sites: int, *, channels: bool) -> None:
        self.n_sites = n_sites
        self.channels = channels
        self.sums: NDArray[np.float64] | None = None

    def read(self, rows: Tensor, which: Tensor, sites: Tensor) -> Readings:
        """Readings of some outputs; sums grow by them.

        Parameters
        ----------
        rows : Tensor of shape (n_rows, hidden)
            Outputs before the weights.
        which : int64 Tensor of shape (n,)
            The rows to read.
        sites : int64 Tensor of shape (n,)
            Number of each one's expert and domain, below `n_sites`.
        """
        if self.channels and self.sums is None:
            self.sums = np.zeros((self.n_sites, 2, rows.shape[-1]))
        read = self._on_host if rows.device.type == "cpu" else self._on_device
        return read(rows, which, sites)

    def _on_host(self, rows: Tensor, which: Tensor, sites: Tensor) -> Readings:
        """By the Rust core: every output is read from memory once."""
        order = sites.argsort(stable=True)
        counts = np.bincount(sites.numpy(), minlength=self.n_sites)
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int64)
        threads = torch.get_num_threads()
        found = read_outputs(_as_array(rows), which[order].numpy(), starts, self.sums, threads)
        readings = Readings.zeros(len(order))
        readings.norm[order] = torch.from_numpy(found["norm"])
        readings.peak[order] = torch.from_numpy(found["peak"])
        readings.channel[order] = torch.from_numpy(found["channel"].astype(np.int32))
        return readings

    def _on_device(self, rows: Tensor, which: Tensor, sites: Tensor) -> Readings:
        """By torch, a few slots at a time."""
        readings = Readings.zeros(len(which))
        for start in range(0, len(which), _CHUNK):
            span = slice(start, start + _CHUNK)
            some = rows[which[span]]
            peak, channel = some.abs().max(dim=-1)
            norm = torch.linalg.vector_norm(some, dim=-1, dtype=torch.float32)
            readings.norm[span], readings.peak[span] = norm.cpu(), peak.float().cpu()
            readings.channel[span] = channel.int().cpu()
            if self.sums is not None:
                self._add(some.double(), sites[span])
        return readings

    def _add(self, rows: Tensor, sites: Tensor) -> None:
        if self.sums is None:
            return
        names, group = torch.unique(sites, return_inverse=True)
        both = torch.stack((rows, rows * rows), dim=1)
        total = both.new_zeros((len(names), *both.shape[1:])).index_add_(0, group, both)
        self.sums[names.cpu().numpy()] += total.cpu().numpy()


def _as_array(flat: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """The memory of a tensor; bfloat16 as its bits, other types as float32."""
    if flat.dtype == torch.bfloat16:
        bits: NDArray[np.uint16] = flat.contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits
    array: NDArray[np.float32] = flat.float().contiguous().numpy()
    return array
