"""Sums per expert from sources that hold no single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

from moecollab.errors import DataError, SchemaError
from moecollab.manifest import MANIFEST, check_manifest, digest_bytes, digest_file, read_json
from moecollab.record.activations import Activations, load_activations
from moecollab.record.recording import Recording
from moecollab.record.schema import COUNTS_KIND, TALLIES
from moecollab.record.tallies import Tallies, load_tallies

KIND, VERSION = COUNTS_KIND, 1


@dataclass(frozen=True)
class RoutingCounts(Recording):
    """Sums by domain, layer and expert, in a folder; there are no rows to fit or to mine.

    Made by :func:`moecollab.import_routing` from sources that count, opened by
    :func:`load_counts`, and scored by :func:`moecollab.score`.
    """

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that were counted apart."""
        return tuple(self.manifest["domains"])

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the sums that the source holds."""
        return tuple(self.manifest["recorded"])

    @property
    def has_weights(self) -> bool:
        """Whether sums of routing weights were recorded."""
        return "sum_weight" in self.recorded

    @property
    def has_norms(self) -> bool:
        """Whether sums of weight times output norm were recorded, which ``reap`` reads."""
        return "sum_weighted_norm" in self.recorded

    @property
    def groups(self) -> tuple[str, ...]:
        """What was summed, as in :data:`moecollab.record.sums.GROUPS`."""
        return ("routing", "norms") if self.has_norms else ("routing",)

    def tallies(self) -> Tallies:
        """Sums by domain, layer and expert: those among `recorded`."""
        return load_tallies(self.path / TALLIES)

    def digest(self) -> str:
        """Digest of the manifest and the tallies."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        names = (MANIFEST, TALLIES)
        return digest_bytes("".join(digest_file(self.path / name) for name in names).encode())

    def __repr__(self) -> str:
        kind = self.manifest["model"]["class"]
        return (
            f"RoutingCounts({kind}: {self.n_layers} MoE layers × {self.n_experts} experts, "
            f"top {self.top_k}; {', '.join(self.recorded)} in {len(self.domains)} domains)"
        )


def load_counts(path: str | PathLike[str]) -> RoutingCounts:
    """Opens a folder of sums, after checking that it is whole.

    Raises
    ------
    DataError
        When a file is missing or truncated.
    SchemaError
        When the folder is of another kind or version, or its arrays have other shapes.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no counts (no {MANIFEST}); make them with import")
    manifest = read_json(folder / MANIFEST)
    check_manifest(manifest, KIND, VERSION, folder)
    try:
        counts = RoutingCounts(folder, manifest)
        wanted = (len(counts.domains), counts.n_layers, counts.n_experts)
        _ = (counts.top_k, counts.recorded)
    except (KeyError, TypeError, ValueError) as cause:
        raise SchemaError(f"{folder / MANIFEST} lacks {cause}; import again") from cause
    shape = counts.tallies().count.shape
    if shape != wanted:
        raise SchemaError(f"{folder / TALLIES} has shape {shape}, not {wanted}; import again")
    return counts


def open_recorded(
    given: Activations | RoutingCounts | str | PathLike[str],
) -> Activations | RoutingCounts:
    """A recording that is open already, or the one in a folder, whichever kind it is of."""
    if isinstance(given, Activations | RoutingCounts):
        return given
    note = Path(given) / MANIFEST
    if note.is_file() and read_json(note).get("kind") == KIND:
        return load_counts(given)
    return load_activations(given)
