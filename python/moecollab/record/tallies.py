"""Sums per layer and expert, taken in the recording pass; every criterion is a ratio of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moecollab.errors import (
    DataError,
    MissingInputError,
    SchemaError,
    SettingsError,
    ShapeError,
    unknown_name,
)
from moecollab.record.sums import GROUPS, SUMS, join, names_of, total, zeros
from moecollab.record.tensors import write_tensors


@dataclass(frozen=True, repr=False)
class Tallies:
    """Additive sums over routed tokens, by domain, layer and expert.

    Arrays have shape (n_domains, n_layers, n_experts), some with one axis more; without the first
    axis, and with no domains, in a total. A token counts for an expert when its routing weight is
    not zero. Sums of shards, domains and machines are joined by :meth:`merge`; the result does
    not depend on how the tokens were divided, but for rounding in float64 and for which of several
    equal peaks is named: the first.

    Parameters
    ----------
    domains : tuple of str
        Names along the first axis.
    arrays : mapping of str to array
        The sums by name; :data:`moecollab.record.sums.SUMS` says what each is.

    Examples
    --------
    >>> tallies = Tallies.zeros(("law", "code"), n_layers=2, n_experts=4)
    >>> tallies.total()["count"].shape
    (2, 4)
    """

    domains: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        """Checks that all arrays have one shape, but for a last axis of their own."""
        shape = self.count.shape
        for name, value in self.arrays.items():
            wanted = len(shape) + bool(SUMS[name].axis)
            if value.shape[: len(shape)] != shape or value.ndim != wanted:
                raise ShapeError(f"{name} has shape {value.shape}, but count has {shape}")
        if self.domains and len(self.domains) != shape[0]:
            raise ShapeError(f"tallies of {shape[0]} domains have {len(self.domains)} names")

    @classmethod
    def zeros(
        cls,
        domains: Sequence[str],
        n_layers: int,
        n_experts: int,
        *,
        groups: Iterable[str] = ("routing", "norms"),
        width: int = 0,
    ) -> Tallies:
        """Tallies of no tokens: the sums of some groups, outputs having `width` channels."""
        shape = (len(domains), n_layers, n_experts)
        return cls(tuple(domains), {name: zeros(name, shape, width) for name in names_of(groups)})

    def __getitem__(self, name: str) -> NDArray[Any]:
        """One sum by name.

        Raises
        ------
        SettingsError
            When there is no such sum.
        MissingInputError
            When it was not recorded, with what to ask for.
        """
        if name not in SUMS:
            raise SettingsError("sum", name, f"one of {', '.join(self.arrays)}")
        if name not in self.arrays:
            group = SUMS[name].group
            if group in self.groups:  # sums of tables, and of some imports, are not all of a group
                raise MissingInputError(
                    f"{name} was not recorded with these sums; it is taken while the model runs: "
                    "extract again, and with folds=32 (--folds 32) to resample it"
                )
            how = "norms=True" if group == "norms" else f"collect={group!r}"
            raise MissingInputError(f"{name} was not recorded; extract again with {how}")
        return self.arrays[name]

    def keys(self) -> tuple[str, ...]:
        """Names of the sums that were recorded."""
        return tuple(self.arrays)

    def __repr__(self) -> str:
        n_layers, n_experts = self.count.shape[-2:]
        where = f"{len(self.domains)} domains" if self.domains else "all domains together"
        return (
            f"Tallies({where}, {n_layers} layers × {n_experts} experts: {', '.join(self.arrays)})"
        )

    def __contains__(self, name: str) -> bool:
        """Whether a sum was recorded."""
        return name in self.arrays

    @property
    def count(self) -> NDArray[np.int64]:
        """Tokens routed to each expert."""
        return self.arrays["count"]

    @property
    def sum_weight(self) -> NDArray[np.float64]:
        """Sums of the routing weights."""
        return self["sum_weight"]

    @property
    def groups(self) -> tuple[str, ...]:
        """What was recorded, as in :data:`moecollab.record.sums.GROUPS`."""
        held = {SUMS[name].group for name in self.arrays}
        return tuple(group for group in GROUPS if group in held)

    @property
    def has_norms(self) -> bool:
        """Whether expert outputs were recorded."""
        return "norms" in self.groups

    def total(self) -> Tallies:
        """Tallies over all domains: arrays of shape (n_layers, n_experts, …)."""
        return Tallies((), total(self.arrays)) if self.domains else self

    def select(self, domains: Sequence[str]) -> Tallies:
        """Tallies of some domains.

        Raises
        ------
        SettingsError
            When a domain was not recorded.
        """
        for domain in domains:
            if domain not in self.domains:
                raise unknown_name("domain", domain, self.domains)
        rows = [self.domains.index(domain) for domain in domains]
        return Tallies(tuple(domains), {name: value[rows] for name, value in self.arrays.items()})

    def merge(self, other: Tallies) -> Tallies:
        """Tallies of both inputs together; domains are matched by name.

        Raises
        ------
        ShapeError
            When the two are of different models, or hold different sums.
        """
        if self.count.shape[-2:] != other.count.shape[-2:]:
            raise ShapeError(
                f"tallies of {self.count.shape[-2:]} and {other.count.shape[-2:]} layers × experts "
                "do not belong to the same model"
            )
        if set(self.arrays) != set(other.arrays):
            odd = sorted(set(self.arrays) ^ set(other.arrays))
            raise ShapeError(f"only one of the tallies holds {', '.join(odd)}; record both alike")
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        return Tallies(domains, join(self._spread(domains), other._spread(domains)))

    def _spread(self, domains: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """The arrays along a longer list of domains."""
        if bool(domains) != bool(self.domains):
            raise ShapeError("a total and tallies by domain cannot be merged; merge before total()")
        if domains == self.domains:
            return dict(self.arrays)
        rows = [domains.index(domain) for domain in self.domains]
        spread = {}
        for name, value in self.arrays.items():
            spread[name] = np.zeros((len(domains), *value.shape[1:]), value.dtype)
            spread[name][rows] = value
        return spread

    def save(self, path: Path, **about: object) -> None:
        """Writes safetensors with the domains, and what else is told, as metadata."""
        write_tensors(path, self.arrays, {"tallies": json.dumps({"domains": self.domains} | about)})


def load_tallies(path: Path) -> Tallies:
    """The tallies in a file.

    Raises
    ------
    DataError
        When the file is missing or damaged.
    SchemaError
        When it holds no tallies.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("tallies", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist; record the activations again") from cause
    except (SafetensorError, OSError) as cause:
        raise DataError(f"{path} is truncated or damaged; record the activations again") from cause
    known = {name: arrays[name] for name in SUMS if name in arrays}
    if about is None or "count" not in known:
        raise SchemaError(f"{path} holds no counts or no names of domains; record again")
    return Tallies(tuple(about["domains"]), known)
