"""Sums per layer and expert, taken in the recording pass; every criterion is a ratio of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moecollab.errors import DataError, SchemaError, ShapeError
from moecollab.manifest import write_bytes

SUMS = ("sum_weight", "sum_weight_sq", "sum_norm", "sum_norm_sq", "sum_weighted_norm")


@dataclass(frozen=True, kw_only=True)
class Tallies:
    """Additive sums over routed tokens, by domain, layer and expert.

    Arrays have shape (n_domains, n_layers, n_experts); without the first axis, and with no
    domains, in a total. A token counts for an expert when its routing weight is not zero. Where
    norms were not recorded, what is made of them is zero and `has_norms` is false.

    Parameters
    ----------
    domains : tuple of str
        Names along the first axis.
    count : int64 array
        Tokens routed to the expert.
    sum_weight, sum_weight_sq : float64 array
        Sums of the routing weight g and of g².
    sum_norm, sum_norm_sq : float64 array
        Sums of the output norm ‖f‖, before the weight, and of ‖f‖².
    sum_weighted_norm : float64 array
        Sum of g‖f‖.
    max_abs : float64 array
        Largest magnitude of an output entry, before the weight.
    has_norms : bool
        Whether expert outputs were recorded.
    """

    domains: tuple[str, ...]
    count: NDArray[np.int64]
    sum_weight: NDArray[np.float64]
    sum_weight_sq: NDArray[np.float64]
    sum_norm: NDArray[np.float64]
    sum_norm_sq: NDArray[np.float64]
    sum_weighted_norm: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    has_norms: bool = True

    def __post_init__(self) -> None:
        """Checks that all arrays have one shape."""
        shape = self.count.shape
        for name in (*SUMS, "max_abs"):
            if getattr(self, name).shape != shape:
                raise ShapeError(
                    f"{name} has shape {getattr(self, name).shape}, expected {shape} as count has"
                )
        if self.domains and len(self.domains) != shape[0]:
            raise ShapeError(f"tallies of {shape[0]} domains have {len(self.domains)} names")

    @classmethod
    def zeros(
        cls, domains: Sequence[str], n_layers: int, n_experts: int, *, has_norms: bool = True
    ) -> Tallies:
        """Tallies of no tokens."""
        shape = (len(domains), n_layers, n_experts)
        sums = {name: np.zeros(shape) for name in (*SUMS, "max_abs")}
        count = np.zeros(shape, dtype=np.int64)
        return cls(domains=tuple(domains), count=count, has_norms=has_norms, **sums)

    def total(self) -> Tallies:
        """Tallies over all domains: arrays of shape (n_layers, n_experts)."""
        if not self.domains:
            return self
        sums = {name: getattr(self, name).sum(axis=0) for name in ("count", *SUMS)}
        return Tallies(
            domains=(), max_abs=self.max_abs.max(axis=0), has_norms=self.has_norms, **sums
        )

    def merge(self, other: Tallies) -> Tallies:
        """Tallies of both inputs together; domains are matched by name."""
        if self.count.shape[-2:] != other.count.shape[-2:]:
            raise ShapeError(
                f"tallies of {self.count.shape[-2:]} and {other.count.shape[-2:]} layers × experts "
                "do not belong to the same model"
            )
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        first, second = self._spread(domains), other._spread(domains)
        sums: dict[str, Any] = {name: first[name] + second[name] for name in ("count", *SUMS)}
        peak = np.maximum(first["max_abs"], second["max_abs"])
        norms = self.has_norms and other.has_norms
        return Tallies(domains=domains, max_abs=peak, has_norms=norms, **sums)

    def _spread(self, domains: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """The arrays along a longer list of domains."""
        if bool(domains) != bool(self.domains):
            raise ShapeError("a total and tallies by domain cannot be merged; merge before total()")
        rows = [domains.index(domain) for domain in self.domains]
        spread = {}
        for name in ("count", *SUMS, "max_abs"):
            value = getattr(self, name)
            wide = np.zeros((len(domains), *value.shape[1:]), value.dtype) if domains else value
            if domains:
                wide[rows] = value
            spread[name] = wide
        return spread

    def as_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("count", *SUMS, "max_abs")}

    def save(self, path: Path) -> None:
        """Writes safetensors with the domains as metadata."""
        write_bytes(path, save(self.as_arrays(), metadata=self.metadata()), overwrite=True)

    def metadata(self) -> dict[str, str]:
        """What a file says about the arrays; one key, since the writer keeps no order."""
        return {"tallies": json.dumps({"domains": self.domains, "has_norms": self.has_norms})}


def load_tallies(path: Path) -> Tallies:
    """The tallies in a file."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("tallies", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist; record the activations again") from cause
    except (SafetensorError, OSError) as cause:
        raise DataError(f"{path} is truncated or damaged; record the activations again") from cause
    missing = {"count", "max_abs", *SUMS} - set(arrays)
    if missing or about is None:
        raise SchemaError(f"{path} lacks {sorted(missing) or 'its domains'}; record again")
    wanted = {name: arrays[name] for name in ("count", "max_abs", *SUMS)}
    return Tallies(domains=tuple(about["domains"]), has_norms=about["has_norms"], **wanted)
