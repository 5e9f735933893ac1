"""HSDL on more token rows than memory holds: atoms from a sample, codes of all rows block by block.

What a dictionary is made of shows in a sample: with half a million rows the atoms hardly differ
from those of all. So levels are fitted to as many rows as may be held, drawn from all of them, and
then every row is coded on the result, in order, one block at a time. Blocks are kept in a
checkpoint folder; a stopped run goes on from them and ends with the same bytes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moecollab.errors import ConvergenceWarning, StaleInputError
from moecollab.manifest import MANIFEST, read_json, write_bytes, write_json
from moecollab.patterns.code_file import read_codes, write_codes
from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Collaboration, Level, by_use
from moecollab.patterns.storage import load_collaboration
from moecollab.patterns.transform import absolute_error
from moecollab.progress import track

if TYPE_CHECKING:
    from moecollab.patterns.dictionary import HSDL
    from moecollab.record.activations import Activations
    from moecollab.record.rows import Rows

BLOCK = 65_536
SAMPLE = "sample"


@dataclass
class Sums:
    """What the codes of some rows add up to."""

    usage: NDArray[np.float64]
    peak: NDArray[np.float64]
    code: float
    error: float

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        peak = np.maximum(self.peak, other.peak)
        return Sums(
            self.usage + other.usage, peak, self.code + other.code, self.error + other.error
        )


def fit_streamed(hsdl: HSDL, acts: Activations, checkpoint: Path | None) -> Collaboration:
    """Groups of experts in activations of which only `hsdl.rows_in_memory` tokens are held."""
    with _workspace(checkpoint) as folder:
        _claim(folder, hsdl, acts)
        sampled = _fit_sample(hsdl, acts, folder)
        if sampled.stop_reason == "interrupted":
            return sampled
        paths = _code_all(hsdl, acts, sampled, folder)
        return _assemble(acts, sampled, (paths, folder))


@contextmanager
def _workspace(checkpoint: Path | None) -> Iterator[Path]:
    """The checkpoint folder, or one that is gone afterwards."""
    if checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="moecollab-") as folder:
            yield Path(folder)
        return
    checkpoint.mkdir(parents=True, exist_ok=True)
    yield checkpoint


def _claim(folder: Path, hsdl: HSDL, acts: Activations) -> None:
    """Notes whose checkpoint this is, or refuses one of another run."""
    settings = asdict(hsdl) | {"atoms": None if hsdl.atoms is None else list(hsdl.atoms)}
    del settings["threads"]
    mine = {"activations": acts.digest(), "settings": settings}
    path = folder / MANIFEST
    if path.exists():
        found = read_json(path)
        changed = [name for name in mine if found.get(name) != mine[name]]
        if changed:
            raise StaleInputError(
                f"{folder} is the checkpoint of a fit with other {' and '.join(changed)}; "
                "give the same, or delete it"
            )
    elif any(folder.iterdir()):
        raise StaleInputError(f"{folder} is not empty and no checkpoint; choose another folder")
    else:
        write_json(path, mine)


def _fit_sample(hsdl: HSDL, acts: Activations, folder: Path) -> Collaboration:
    if (folder / SAMPLE).is_dir():
        return load_collaboration(folder / SAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said once, of the whole
        found = replace(hsdl).fit(_draw(hsdl, acts))
    if found.stop_reason != "interrupted":
        found.save(folder / SAMPLE)
    return replace(found, layers=acts.layers, n_experts=acts.n_experts, activations=acts.digest())


def _draw(hsdl: HSDL, acts: Activations) -> Rows:
    """As many token rows as may be held, at random, in order."""
    from moecollab.record.rows import Rows

    rng = np.random.default_rng(hsdl.seed)
    picked = np.sort(rng.choice(acts.n_tokens, hsdl.rows_in_memory, replace=False))
    parts, start = [], 0
    with track("read a sample", acts.n_tokens) as bar:
        for block in acts.token_blocks(hsdl.weights, BLOCK):
            first, last = np.searchsorted(picked, (start, start + block.n_rows))
            parts.append(block.take(picked[first:last] - start))
            start += block.n_rows
            bar.advance(block.n_rows)
    return Rows.join(parts)


def _code_all(hsdl: HSDL, acts: Activations, sampled: Collaboration, folder: Path) -> list[Path]:
    """A file of codes and sums for every block of tokens."""
    n_blocks = -(-acts.n_tokens // BLOCK)
    paths = [folder / f"block-{number:05d}.safetensors" for number in range(n_blocks)]
    with track("code all rows", n_blocks) as bar:
        for number, path in enumerate(paths):
            if not path.exists():
                rows = acts.token_block(number * BLOCK, BLOCK, hsdl.weights)
                codes = sampled.transform(rows, threads=hsdl.threads)
                write_bytes(path, save(_pack(sampled, rows, codes)))
            bar.advance()
    return paths


def _pack(fit: Collaboration, rows: Rows, codes: Codes) -> dict[str, NDArray[Any]]:
    n_atoms = len(fit.levels[0].atoms)
    peak = np.zeros(n_atoms)
    np.maximum.at(peak, codes.atom, codes.value)
    usage = np.bincount(codes.atom, codes.value, n_atoms)
    error = absolute_error(fit.levels[0].atoms, rows, codes)
    sums = np.array([codes.value.sum(dtype=np.float64), error])
    return {
        "indptr": codes.indptr,
        "atom": codes.atom,
        "value": codes.value,
        "usage": usage.astype(np.float64),
        "peak": peak,
        "sums": sums,
    }


def _unpack(path: Path) -> tuple[Codes, Sums]:
    try:
        found = load(path.read_bytes())
    except SafetensorError as cause:
        raise StaleInputError(f"{path} is damaged; delete it and fit again") from cause
    sums = Sums(found["usage"], found["peak"], *(float(value) for value in found["sums"]))
    return Codes(found["indptr"], found["atom"], found["value"]), sums


def _assemble(
    acts: Activations, sampled: Collaboration, where: tuple[list[Path], Path]
) -> Collaboration:
    """The sampled atoms with the use, the codes and the objective of all rows."""
    paths, folder = where
    total = _unpack(paths[0])[1]
    for path in paths[1:]:
        total = total.plus(_unpack(path)[1])
    levels, place = by_use(_levels(sampled.levels, total))
    file = folder / "codes.safetensors"
    write_codes(file, lambda: (_unpack(path)[0].renamed(place) for path in paths))
    history = [row | {"stage": f"sample, {row['stage']}"} for row in sampled.history[:-1]]
    history.append(_final(sampled.settings, levels, total, acts.n_tokens))
    return replace(
        sampled,
        levels=levels,
        codes=read_codes(file, len(levels[0].atoms)),
        history=tuple(history),
        layers=acts.layers,
        n_experts=acts.n_experts,
        activations=acts.digest(),
    )


def _levels(old: Sequence[Level], total: Sums) -> tuple[Level, ...]:
    """Levels with their use over all rows."""
    levels = [replace(old[0], usage=total.usage, peak=total.peak)]
    for level in old[1:]:
        links = np.zeros((0, 0)) if level.links is None else level.links.astype(np.float64)
        levels.append(replace(level, usage=levels[-1].usage @ links))
    return tuple(levels)


def _final(
    settings: Mapping[str, Any], levels: Sequence[Level], total: Sums, n_rows: int
) -> dict[str, Any]:
    """The objective over all rows: eqs. 4 to 7 with sums written out, in float64."""
    size, sparsity = float(levels[0].peak.sum()), total.code / n_rows
    error, use = total.error / n_rows, levels[0].usage / n_rows
    for above, level in pairwise(levels):
        links = np.zeros((0, 0)) if level.links is None else level.links.astype(np.float64)
        rest = np.abs(above.atoms - links @ level.atoms.astype(np.float64)).sum(axis=1)
        size += float(level.peak.sum())
        sparsity += float(use @ links.sum(axis=1))
        error += float(use @ rest)
        use = links.sum(axis=0) / len(links)
    weights = [settings[name] for name in ("dictionary_size", "sparsity", "reconstruction")]
    weighted = float(np.dot(weights, (size, sparsity, error)))
    return {
        "stage": "final",
        "iteration": 0,
        "dictionary_size": size,
        "sparsity": sparsity,
        "reconstruction": error,
        "total": weighted,
        "live": int(sum((level.peak > 0).sum() for level in levels)),
    }
