"""HSDL on more token rows than memory holds: a sample first, then passes over all rows in blocks.

Levels are fitted to as many rows as may be held, drawn from all of them. Then every pass codes all
rows, block by block, on the present atoms, which gives the objective of all rows, and gathers what
the next atoms need (:mod:`moecollab.patterns.steps`). A pass that is not better than the one before
is discarded. Blocks are kept in a checkpoint folder; a stopped run goes on from them and ends with
the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from moecollab.errors import ConvergenceWarning, StaleInputError
from moecollab.manifest import MANIFEST, read_json, write_bytes, write_json
from moecollab.patterns.code_file import read_codes, write_codes
from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Collaboration, by_use
from moecollab.patterns.steps import (
    Arrays,
    Atoms,
    Levels,
    Steps,
    Task,
    enter,
    full_scale,
    leave,
    pull_of,
    step_finer,
    steps_of,
    terms,
    total,
    weighted_median,
)
from moecollab.patterns.storage import load_collaboration
from moecollab.progress import track
from moecollab.record.rows import Rows

if TYPE_CHECKING:
    from moecollab.patterns.dictionary import HSDL
    from moecollab.record.activations import Activations

BLOCK = 65_536
SAMPLE, SUMS = "sample", "sums.safetensors"
CODE = ("indptr", "atom", "value")
MOVED = "moved"
HELD = 16_777_216
"""Entries of atoms, over all blocks, that are held at once."""


@dataclass(frozen=True)
class Pass:
    """One pass over all rows: the levels it used, what they summed up to, and the objective."""

    number: int
    levels: Levels
    sums: Arrays
    row: dict[str, Any]

    @property
    def objective(self) -> float:
        """The weighted total over all rows."""
        return float(self.row["total"])


@dataclass
class Stream:
    """A fit under way: rows, settings, the folder it works in and the best pass so far."""

    hsdl: HSDL
    acts: Activations
    folder: Path
    settings: Mapping[str, Any]
    passes: list[Pass] = field(default_factory=list)

    @property
    def steps(self) -> Steps:
        """The steps of the loss."""
        return steps_of(self.settings, self.hsdl.threads or 0)

    @property
    def block(self) -> int:
        """Rows of a block."""
        return min(BLOCK, self.hsdl.rows_in_memory)

    @property
    def n_blocks(self) -> int:
        """Blocks of all rows."""
        return -(-self.acts.n_tokens // self.block)

    def place(self, number: int) -> Path:
        """Folder of a pass."""
        return self.folder / f"pass-{number:02d}"

    def blocks(self, number: int) -> list[Path]:
        """Files of its blocks."""
        return [self.place(number) / f"block-{at:05d}.safetensors" for at in range(self.n_blocks)]


def fit_streamed(hsdl: HSDL, acts: Activations, checkpoint: Path | None) -> Collaboration:
    """Groups of experts in activations of which only `hsdl.rows_in_memory` tokens are held."""
    with _workspace(checkpoint) as folder:
        _claim(folder, hsdl, acts)
        sampled = _fit_sample(hsdl, acts, folder)
        if sampled.stop_reason == "interrupted":
            return sampled
        stream = Stream(hsdl, acts, folder, sampled.settings)
        stop = "interrupted"
        with suppress(KeyboardInterrupt):
            stop = _descend(stream, sampled)
        if not stream.passes:
            return replace(sampled, stop_reason=stop)
        if stop == "tolerance" and not sampled.converged:
            stop = sampled.stop_reason
        return _assemble(stream, sampled, stop)


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
    rng = np.random.default_rng(hsdl.seed)
    picked = np.sort(rng.choice(acts.n_tokens, hsdl.rows_in_memory, replace=False))
    parts, start = [], 0
    with track("read a sample", acts.n_tokens) as bar:
        for block in acts.token_blocks(hsdl.weights, min(BLOCK, hsdl.rows_in_memory)):
            first, last = np.searchsorted(picked, (start, start + block.n_rows))
            parts.append(block.take(picked[first:last] - start))
            start += block.n_rows
            bar.advance(block.n_rows)
    return Rows.join(parts)


def _descend(stream: Stream, sampled: Collaboration) -> str:
    """Passes until one gains less than the tolerance; returns why they ended."""
    levels = enter(sampled.levels, sampled.n_rows, stream.steps)
    for number in range(1, stream.hsdl.max_iterations + 1):
        now = _pass(stream, levels, number)
        last = stream.passes[-1] if stream.passes else None
        if last is not None and now.objective >= last.objective:
            shutil.rmtree(stream.place(number))
            return "tolerance"
        stream.passes.append(now)
        if last is not None:
            for path in stream.blocks(last.number):
                path.unlink(missing_ok=True)
            if last.objective - now.objective <= stream.hsdl.tolerance * last.objective:
                return "tolerance"
        levels = _next(stream, now)
    return "max iterations"


def _pass(stream: Stream, levels: Levels, number: int) -> Pass:
    """Codes all rows on the atoms, unless that has been done."""
    place = stream.place(number)
    place.mkdir(exist_ok=True)
    file = place / SUMS
    if not file.exists():
        with track(f"pass {number} over all rows", stream.n_blocks) as bar:
            for at, path in enumerate(stream.blocks(number)):
                if not path.exists():
                    write_bytes(path, save(_share(stream, levels, at)))
                bar.advance()
        write_bytes(file, save(_summed(stream.blocks(number), levels.stages[0].atoms)))
    sums = _read(file)
    first = replace(levels.stages[0], caps=sums["peak"])
    measured = Levels((first, *levels.stages[1:]), sums["usage"] / stream.acts.n_tokens)
    return Pass(number, measured, sums, _row(stream, measured, sums, number))


def _share(stream: Stream, levels: Levels, at: int) -> Arrays:
    """Codes of one block of rows, and what it adds."""
    acts, first = stream.acts, levels.stages[0]
    rows = acts.token_block(at * stream.block, stream.block, stream.hsdl.weights)
    codes = stream.steps.code(rows, first)
    weight = np.full(rows.n_rows, 1 / acts.n_tokens)
    task = Task(rows, weight, rows.n_rows / acts.n_tokens)
    shares = stream.steps.share(task, first, codes, pull_of(levels))
    peak = np.zeros(len(first.atoms))
    np.maximum.at(peak, codes.atom, codes.value)
    usage = np.bincount(codes.atom, codes.value, len(first.atoms)).astype(np.float64)
    parts: Arrays = {"indptr": codes.indptr, "atom": codes.atom, "value": codes.value}
    return {**parts, "peak": peak, "usage": usage, **shares}


def _summed(paths: Sequence[Path], old: Atoms) -> Arrays:
    """What all blocks come to; only one of them is held at a time."""
    found: Arrays = {}
    for path in paths:
        for name, array in _read(path).items():
            if name == "peak":
                found[name] = np.maximum(found.get(name, 0.0), array)
            elif name not in (*CODE, MOVED):
                found[name] = found.get(name, 0.0) + array.astype(np.float64)
    if MOVED in _names(paths[0]):
        found[MOVED] = _medians(paths, old)
    return found


def _medians(paths: Sequence[Path], old: Atoms) -> Atoms:
    """Weighted medians of where the blocks put the atoms, some atoms at a time."""
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


def _names(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return list(file.keys())


def _read(path: Path) -> Arrays:
    try:
        found: Arrays = load(path.read_bytes())
    except SafetensorError as cause:
        raise StaleInputError(f"{path} is damaged; delete it and fit again") from cause
    return found


def _codes(path: Path) -> Codes:
    found = _read(path)
    return Codes(*(found[name] for name in CODE))


def _row(stream: Stream, levels: Levels, sums: Arrays, number: int) -> dict[str, Any]:
    """The line of the history."""
    size, sparsity, error = terms(levels, float(sums["cost"][0]), stream.steps)
    return {
        "stage": "all rows",
        "iteration": number,
        "dictionary_size": size,
        "sparsity": sparsity,
        "reconstruction": error,
        "total": total(stream.settings, (size, sparsity, error)),
        "live": int(sum((stage.caps > 0).sum() for stage in levels.stages)),
    }


def _next(stream: Stream, now: Pass) -> Levels:
    """Atoms one step further on."""
    first, steps = now.levels.stages[0], stream.steps
    atoms = steps.move(first, now.sums, pull_of(now.levels))
    scaled, factor = full_scale(replace(first, atoms=atoms), steps)
    return step_finer(Levels((scaled, *now.levels.stages[1:]), now.levels.use * factor), steps)


def _assemble(stream: Stream, sampled: Collaboration, stop: str) -> Collaboration:
    """The best pass as a collaboration; its codes are read only where they are looked at."""
    best, acts = stream.passes[-1], stream.acts
    levels, place = by_use(leave(best.levels, acts.n_tokens))
    file, scale = stream.folder / "codes.safetensors", best.levels.largest()
    paths = stream.blocks(best.number)
    write_codes(file, lambda: (_codes(path).scaled(scale).renamed(place) for path in paths))
    history = [row | {"stage": f"sample, {row['stage']}"} for row in sampled.history[:-1]]
    history += [each.row for each in stream.passes]
    history.append(best.row | {"stage": "final", "iteration": 0})
    return replace(
        sampled,
        levels=levels,
        codes=read_codes(file, len(levels[0].atoms)),
        history=tuple(history),
        stop_reason=stop,
        layers=acts.layers,
        n_experts=acts.n_experts,
        activations=acts.digest(),
    )
