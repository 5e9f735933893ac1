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
    """What is known of the slots that were used; zeros elsewhere, (n_positions, top_k) each.

    Parameters
    ----------
    norm : float32 Tensor
        Euclidean norm of the output.
    peak : float32 Tensor
        Largest magnitude of its entries.
    channel : int64 Tensor
        The first channel that has it.
    """

    norm: Tensor
    peak: Tensor
    channel: Tensor


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

    def read(self, slots: Tensor, site: Tensor, used: Tensor) -> Readings:
        """Readings of a batch; sums grow by it.

        Parameters
        ----------
        slots : Tensor of shape (n_positions, top_k, hidden)
            Outputs before the weights.
        site : int64 Tensor of shape (n_positions, top_k)
            Number of each slot's expert and domain, below `n_sites`.
        used : bool Tensor of shape (n_positions, top_k)
            Slots that count.
        """
        if self.channels and self.sums is None:
            self.sums = np.zeros((self.n_sites, 2, slots.shape[-1]))
        flat = slots.detach().reshape(-1, slots.shape[-1])
        picked = used.reshape(-1).nonzero()[:, 0]
        sites = site.reshape(-1)[picked]
        read = self._on_host if slots.device.type == "cpu" else self._on_device
        found = read(flat, picked, sites)
        columns = []
        for values, dtype in zip(found, (torch.float32, torch.float32, torch.int64), strict=True):
            column = torch.zeros(used.numel(), dtype=dtype)
            column[picked.cpu()] = values.to(dtype).cpu()
            columns.append(column.reshape(used.shape))
        return Readings(*columns)

    def _on_host(self, flat: Tensor, picked: Tensor, sites: Tensor) -> list[Tensor]:
        """By the Rust core: every output is read from memory once."""
        order = sites.argsort(stable=True)
        counts = np.bincount(sites.numpy(), minlength=self.n_sites)
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int64)
        slots = picked[order]
        found = read_outputs(
            _as_array(flat), slots.numpy(), starts, self.sums, torch.get_num_threads()
        )
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        columns = (found["norm"], found["peak"], found["channel"].astype(np.int64))
        return [torch.from_numpy(column)[back] for column in columns]

    def _on_device(self, flat: Tensor, picked: Tensor, sites: Tensor) -> list[Tensor]:
        """By torch, a few slots at a time."""
        parts: list[list[Tensor]] = [[], [], []]
        for start in range(0, len(picked), _CHUNK):
            rows = flat[picked[start : start + _CHUNK]]
            peak, channel = rows.abs().max(dim=-1)
            norm = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
            for part, value in zip(parts, (norm, peak.float(), channel), strict=True):
                part.append(value)
            if self.sums is not None:
                self._add(rows.double(), sites[start : start + _CHUNK])
        return [torch.cat(part) if part else flat.new_zeros(0) for part in parts]

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
