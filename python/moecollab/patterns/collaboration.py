"""Collaboration: what a fit found, on disk and in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import SettingsError
from moecollab.patterns.codes import Codes

if TYPE_CHECKING:
    from moecollab.record.activations import Activations
    from moecollab.record.rows import Rows

History: TypeAlias = tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Level:
    """Atoms of one level, the most used first, unused ones last.

    Parameters
    ----------
    atoms : float32 array of shape (n_atoms, n_sites)
        Strength of every expert in every atom, in [0, 1].
    usage : float64 array of shape (n_atoms,)
        Total code over all rows; at finer levels through the codes of the levels above.
    peak : float64 array of shape (n_atoms,)
        Largest code; 0 for an atom that nothing uses.
    links : float32 array of shape (n_atoms of the level above, n_atoms), or None
        How the atoms of the level above are made of these; None for level 1.
    """

    atoms: NDArray[np.float32]
    usage: NDArray[np.float64]
    peak: NDArray[np.float64]
    links: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Collaboration:
    """Groups of experts that work together, coarse to fine, and how much each row uses them.

    Made by :meth:`moecollab.HSDL.fit`. Levels are counted from 1.

    Parameters
    ----------
    levels : tuple of Level
        Coarse to fine.
    codes : Codes
        How every row is written in atoms of level 1.
    history : tuple of dict
        A row per iteration: stage, iteration, dictionary_size, sparsity, reconstruction (without
        their weights), the weighted total and the atoms in use (live). Within a stage the total
        never rises. The last row, ``final``, is the objective of the result.
    stop_reason : str
        "tolerance", "max iterations", "interrupted" or "nothing to fit".
    layers : tuple of int
        The model's own indices of its MoE layers.
    n_experts : int
        Routed experts per layer.
    settings : mapping
        Settings of the fit.
    activations : str or None
        Digest of the activations fitted, if there were any.
    """

    levels: tuple[Level, ...]
    codes: Codes
    history: History
    stop_reason: str
    layers: tuple[int, ...]
    n_experts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    activations: str | None = None

    @property
    def converged(self) -> bool:
        """Whether every stage met its tolerance, or there was nothing to fit."""
        return self.stop_reason in ("tolerance", "nothing to fit")

    @property
    def objective(self) -> float:
        """The objective of the result."""
        return float(self.history[-1]["total"])

    @property
    def n_rows(self) -> int:
        """Rows that were fitted."""
        return self.codes.n_rows

    @property
    def n_sites(self) -> int:
        """Routed experts over all layers."""
        return len(self.layers) * self.n_experts

    def live(self, level: int) -> NDArray[np.bool_]:
        """Which atoms of a level are used at all: bool array of shape (n_atoms,)."""
        used: NDArray[np.bool_] = self._level(level).peak > 0
        return used

    def members(
        self, level: int, atom: int, threshold: float = 0.5
    ) -> list[tuple[int, int, float]]:
        """(layer, expert, strength) of the experts of one atom, in order of layer and expert.

        Parameters
        ----------
        level : int
            Level, from 1.
        atom : int
            Atom of that level.
        threshold : float
            Least strength of a member, in [0, 1].
        """
        strength = self._level(level).atoms[self._atom(level, atom)]
        sites = np.flatnonzero((strength >= threshold) & (strength > 0))
        return [
            (self.layers[site // self.n_experts], int(site % self.n_experts), float(strength[site]))
            for site in sites.tolist()
        ]

    def links(self, level: int, atom: int) -> list[tuple[int, int, float]]:
        """(level, atom, part) of the atoms that this one is made of or is part of.

        Finer atoms that it is made of come first, then coarser ones that it is part of, each with
        the strongest first.
        """
        self._atom(level, atom)
        found = []
        if level < len(self.levels):
            finer = self._level(level + 1).links
            found += _strongest(level + 1, finer[atom] if finer is not None else None)
        if level > 1:
            own = self._level(level).links
            found += _strongest(level - 1, own[:, atom] if own is not None else None)
        return found

    def explain(self, level: int, atom: int) -> str:
        """Members, use and relatives of one atom, in words.

        Parameters
        ----------
        level : int
            Level, from 1.
        atom : int
            Atom of that level.
        """
        at, total = self._level(level), self._level(level).usage.sum()
        members = self.members(level, atom)
        if not at.peak[atom] > 0:
            return f"Level {level}, atom {atom}: not used by any row."
        share = at.usage[atom] / total
        lines = [f"Level {level}, atom {atom}: {share:.1%} of all use, {_count(members)}."]
        for layer in sorted({layer for layer, _, _ in members}):
            own = [f"{expert} ({s:.2f})" for at_layer, expert, s in members if at_layer == layer]
            lines.append(f"  layer {layer}: expert {', '.join(own)}")
        for other, relative, part in self.links(level, atom):
            word = "made of" if other > level else "part of"
            lines.append(f"  {word} level {other}, atom {relative} ({part:.2f})")
        return "\n".join(lines)

    def transform(
        self, acts: Activations | Rows, *, level: int = 1, threads: int | None = None
    ) -> Codes:
        """Codes of other rows on these atoms.

        At level 1 a row's codes descend on λ₁ Σ r + λ₂ ‖x − D r‖₁ from nothing, by exact steps,
        with no code above the largest that was fitted; at finer levels they follow the links.

        Parameters
        ----------
        acts : Activations or Rows
            New activations, taken with the grain and weights of the fit, or rows of the same sites.
        level : int
            Level whose atoms are wanted, from 1.
        threads : int, optional
            Threads; one per processor by default. The result is the same for any number.

        Raises
        ------
        SettingsError
            When there is no such level, or the rows have other sites.
        """
        from moecollab.patterns.transform import encode

        self._level(level)
        return encode(self, acts, level, threads)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the collaboration as a folder, whole or not at all.

        Parameters
        ----------
        path : path
            Folder to make.
        overwrite : bool
            Whether a folder of that name may be replaced.
        """
        from moecollab.patterns.storage import write

        write(self, Path(path), overwrite=overwrite)

    def _level(self, level: int) -> Level:
        if not 1 <= level <= len(self.levels):
            raise SettingsError("level", level, f"in 1 to {len(self.levels)}")
        return self.levels[level - 1]

    def _atom(self, level: int, atom: int) -> int:
        n_atoms = len(self._level(level).atoms)
        if not 0 <= atom < n_atoms:
            raise SettingsError("atom", atom, f"in 0 to {n_atoms - 1} at level {level}")
        return atom

    def __repr__(self) -> str:
        parts = []
        for number in range(1, len(self.levels) + 1):
            live = self.live(number)
            size = (self.levels[number - 1].atoms[live] >= 0.5).sum(axis=1)
            mean = f", {size.mean():.1f} experts each" if live.any() else ""
            parts.append(f"level {number}: {live.sum()} of {len(live)} atoms in use{mean}")
        return (
            f"Collaboration({'; '.join(parts)}; {self.n_rows} rows × {self.n_sites} sites; "
            f"objective {self.objective:.4g}, stopped by {self.stop_reason})"
        )


def by_use(levels: Sequence[Level]) -> tuple[tuple[Level, ...], NDArray[np.uint32]]:
    """The same levels, the most used atoms first, and the new number of each atom of level 1."""
    found: list[Level] = []
    above: NDArray[np.int64] | None = None
    for level in levels:
        order = np.argsort(-level.usage, kind="stable")
        links = level.links
        if links is not None and above is not None:
            links = np.ascontiguousarray(links[above][:, order])
        found.append(Level(level.atoms[order], level.usage[order], level.peak[order], links))
        above = order
        if len(found) == 1:
            place = np.argsort(order).astype(np.uint32)
    return tuple(found), place


def _strongest(level: int, parts: NDArray[np.float32] | None) -> list[tuple[int, int, float]]:
    """Positive parts, largest first."""
    if parts is None:
        return []
    order = [int(atom) for atom in np.argsort(-parts, kind="stable") if parts[atom] > 0]
    return [(level, atom, float(parts[atom])) for atom in order]


def _count(members: list[tuple[int, int, float]]) -> str:
    n_layers = len({layer for layer, _, _ in members})
    experts = "1 expert" if len(members) == 1 else f"{len(members)} experts"
    layers = "1 layer" if n_layers == 1 else f"{n_layers} layers"
    return f"{experts} in {layers}"
