"""Passes over activations in blocks of rows, each kept as a file until a later pass is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from moecollab.errors import StaleInputError
from moecollab.manifest import digest_bytes, write_bytes
from moecollab.patterns.codes import Codes
from moecollab.patterns.steps import Arrays, Atoms, Levels, Steps, weighted_median
from moecollab.progress import track

if TYPE_CHECKING:
    from moecollab.record.activations import Activations, Weights

CODE = ("indptr", "atom", "value")
MOVED = "moved"
SUMS = "sums.safetensors"
HELD = 16_777_216
"""Entries of atoms, over all blocks, that are held at once."""


@dataclass(frozen=True)
class Blocks:
    """Token rows in blocks of one size, and the folder for what is done with them.

    If atoms are not `moving`, blocks only say what they cost.
    """

    acts: Activations
    weights: Weights
    size: int
    steps: Steps
    folder: Path
    moving: bool = True

    def measure(self, levels: Levels, number: int) -> tuple[Arrays, list[Path]]:
        """Codes all rows on the atoms of level 1, unless a file has it; forgets older passes."""
        paths, sums = self._paths(number), self._place(number) / SUMS
        sums.parent.mkdir(parents=True, exist_ok=True)
        if not sums.exists():
            with track(f"pass {number} over all rows", len(paths)) as bar:
                for at, path in enumerate(paths):
                    if not path.exists():
                        write_arrays(path, self._share(levels, at))
                    bar.advance()
            write_arrays(sums, summed(paths, levels.stages[0].atoms))
        for old in self._paths(number - 2) if number > 2 else ():
            old.unlink(missing_ok=True)
        return read_arrays(sums) | {"rows": np.array(float(self.acts.n_tokens))}, paths

    def _place(self, number: int) -> Path:
        return self.folder / f"pass-{number:02d}"

    def _paths(self, number: int) -> list[Path]:
        n_blocks = -(-self.acts.n_tokens // self.size)
        return [self._place(number) / f"block-{at:05d}.safetensors" for at in range(n_blocks)]

    def _share(self, levels: Levels, at: int) -> Arrays:
        """Codes of one block of rows, and what it adds."""
        rows = self.acts.token_block(at * self.size, self.size, self.weights)
        weight = np.full(rows.n_rows, 1 / self.acts.n_tokens)
        first = levels.stages[0]
        codes = self.steps.code(rows, first)
        parts: Arrays = {"indptr": codes.indptr, "atom": codes.atom, "value": codes.value}
        use = use_of(codes, len(first.atoms))
        added = self.steps.share if self.moving else self.steps.cost
        return {**parts, **use, **added(rows, weight, first, codes)}


def use_of(codes: Codes, n_atoms: int) -> Arrays:
    """Largest and total code of each atom: ``peak`` and ``usage``, float64 (n_atoms,)."""
    peak = np.zeros(n_atoms)
    np.maximum.at(peak, codes.atom, codes.value)
    return {"peak": peak, "usage": np.bincount(codes.atom, codes.value, n_atoms).astype(float)}


def summed(paths: Sequence[Path], old: Atoms) -> Arrays:
    """What all blocks come to; only one of them is held at a time."""
    found: Arrays = {}
    moved = False
    for path in paths:
        for name, array in read_arrays(path).items():
            if name == "peak":
                found[name] = np.maximum(found.get(name, 0.0), array)
            elif name not in (*CODE, MOVED):
                found[name] = found.get(name, 0.0) + array.astype(np.float64)
            moved |= name == MOVED
    return found | ({MOVED: _medians(paths, old)} if moved else {})


def _medians(paths: Sequence[Path], old: Atoms) -> Atoms:
    """Medians of where the blocks put the atoms, weighted by use; some atoms at a time."""
    found = np.empty_like(old)
    size = max(1, HELD // (len(paths) * old.shape[1]))
    for start in range(0, len(old), size):
        part = slice(start, min(start + size, len(old)))
        values, weight = [], []
        for path in paths:
            with safe_open(path, "np") as file:
                values.append(file.get_slice(MOVED)[part])
                weight.append(file.get_slice("usage")[part])
        found[part] = weighted_median(np.stack(values), np.stack(weight), old[part])
    return found


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Arrays as a file that knows its own digest."""
    write_bytes(path, save(arrays, {"digest": _digest(arrays)}))


def read_arrays(path: Path) -> Arrays:
    """Arrays of such a file.

    Raises
    ------
    StaleInputError
        When it is missing, truncated or not what was written.
    """
    try:
        found: Arrays = load(path.read_bytes())
        with safe_open(path, "np") as file:
            noted = (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as cause:
        raise _damaged(path) from cause
    if noted != _digest(found):
        raise _damaged(path)
    return found


def _digest(arrays: Arrays) -> str:
    parts = (np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))
    return digest_bytes(b"".join(parts))


def _damaged(path: Path) -> StaleInputError:
    return StaleInputError(f"{path} is damaged; delete it and fit again")


def read_block(path: Path) -> Codes:
    """Codes of one block."""
    found = read_arrays(path)
    return Codes(*(found[name] for name in CODE))
