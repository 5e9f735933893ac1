"""HSDL on more token rows than memory holds: a sample first, then passes over all rows in blocks.

Levels are fitted to as many rows as may be held, drawn from all of them. Then every pass codes all
rows, block by block, on the present atoms, which gives the objective of all rows, and gathers what
the next atoms need (:mod:`moecollab.patterns.steps`). A pass that is not better than the one before
is discarded. Blocks are kept in a checkpoint folder; a stopped run goes on from them and ends with
the same bytes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecollab.errors import (
    ConvergenceWarning,
    DataError,
    SchemaError,
    SettingsError,
    StaleInputError,
)
from moecollab.manifest import MANIFEST, read_json, write_json
from moecollab.patterns.blocks import Blocks, read_block
from moecollab.patterns.code_file import read_codes, write_codes
from moecollab.patterns.collaboration import Collaboration, History, by_use
from moecollab.patterns.passes import Descent, Pass, graver
from moecollab.patterns.sizes import level_sizes
from moecollab.patterns.steps import enter, leave, steps_of
from moecollab.patterns.storage import load_collaboration
from moecollab.progress import track
from moecollab.record.rows import Rows

if TYPE_CHECKING:
    from moecollab.patterns.dictionary import HSDL
    from moecollab.record.activations import Activations

FORMAT = 1
BLOCK = 65_536
SAMPLE, CODES = "sample", "codes.safetensors"


def fit_streamed(hsdl: HSDL, acts: Activations, checkpoint: Path | None) -> Collaboration:
    """Groups of experts in activations of which only `hsdl.rows_in_memory` tokens are held.

    Under squared error all levels move together in the passes. Under absolute error they would
    stand still: the pull of level 2 on an entry of level 1 is as strong as all data. There level 1
    moves alone; then the finer levels are fitted below it to the sample, and with it once more.
    """
    with _workspace(checkpoint) as folder:
        _claim(folder, hsdl, acts)
        sizes = level_sizes(hsdl.atoms, acts.n_tokens, acts.n_sites)
        if sizes[0] > hsdl.rows_in_memory:
            allowed = f"at least {sizes[0]}, a row for each atom of level 1"
            raise SettingsError("rows_in_memory", hsdl.rows_in_memory, allowed)
        alone = hsdl.loss == "l1" and len(sizes) > 1
        first = replace(hsdl, atoms=sizes[:1] if alone else sizes)
        found = _stream(first, acts, folder / "first")
        if alone and found.stop_reason != "interrupted":
            whole = replace(hsdl, atoms=sizes)
            found = _stream(whole, acts, folder / "whole", found)
        return found


def _stream(
    hsdl: HSDL, acts: Activations, folder: Path, start: Collaboration | None = None
) -> Collaboration:
    """A sample's levels, moved by passes over all rows; below given atoms there is one pass."""
    sampled = _fit_sample(hsdl, acts, folder, start)
    if sampled.stop_reason == "interrupted":
        return sampled if start is None else replace(start, stop_reason="interrupted")
    steps = steps_of(sampled.settings, hsdl.threads or 0)
    size = min(BLOCK, hsdl.rows_in_memory)
    blocks = Blocks(acts, hsdl.weights, size, steps, folder, moving=start is None)
    name = "all rows" if len(sampled.levels) > 1 else "level 1 on all rows"
    descent = Descent(steps, blocks.measure, name)
    stop = "interrupted"
    with suppress(KeyboardInterrupt):
        levels = enter(sampled.levels, sampled.n_rows, steps)
        stop = descent.run(levels, hsdl.max_iterations if start is None else 1)
    if descent.best is None:
        return replace(start or sampled, stop_reason=stop)
    found = _assemble(acts, sampled, descent.best, folder / CODES)
    history = _history(sampled, descent.rows)
    if start is None:
        return replace(found, history=history, stop_reason=graver(sampled.stop_reason, stop))
    reason = "tolerance" if stop == "max iterations" else stop  # one pass is all there is to do
    reason = graver(start.stop_reason, sampled.stop_reason, reason)
    return replace(found, history=(*start.history[:-1], *history), stop_reason=reason)


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
    mine = {"activations": acts.digest(), "settings": settings, "format": [FORMAT, BLOCK]}
    path = folder / MANIFEST
    if path.exists():
        found = read_json(path)
        changed = [name for name in mine if found.get(name) != mine[name]]
        if changed:
            raise StaleInputError(
                f"{folder} is the checkpoint of a fit with other {' and '.join(changed)}; "
                "give the same, or delete it"
            )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StaleInputError(f"{folder} is not empty and no checkpoint; choose another folder")
    else:
        write_json(path, mine)


def _fit_sample(
    hsdl: HSDL, acts: Activations, folder: Path, start: Collaboration | None
) -> Collaboration:
    """Levels fitted to a sample, below the atoms of `start` if it is given."""
    if (folder / SAMPLE).is_dir():
        try:
            return load_collaboration(folder / SAMPLE)
        except (DataError, SchemaError) as cause:
            raise StaleInputError(
                f"{folder / SAMPLE} is damaged; delete it and fit again"
            ) from cause
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said once, of the whole
        found = hsdl.fit_rows(_draw(hsdl, acts), None if start is None else start.levels[0])
    found = replace(found, layers=acts.layers, n_experts=acts.n_experts, activations=acts.digest())
    if found.stop_reason != "interrupted":
        found.save(folder / SAMPLE)
    return found


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


def _assemble(
    acts: Activations, sampled: Collaboration, best: Pass[list[Path]], file: Path
) -> Collaboration:
    """A pass as a collaboration; its codes are read only where they are looked at."""
    levels, place = by_use(leave(best.levels, acts.n_tokens))
    scale, blocks = best.levels.largest(), best.codes
    write_codes(file, lambda: (read_block(each).scaled(scale).renamed(place) for each in blocks))
    return replace(sampled, levels=levels, codes=read_codes(file, len(levels[0].atoms)))


def _history(sampled: Collaboration, passes: Sequence[dict[str, Any]]) -> History:
    rows = [row | {"stage": f"sample, {row['stage']}"} for row in sampled.history[:-1]]
    return (*rows, *passes, passes[-1] | {"stage": "final", "iteration": 0})
