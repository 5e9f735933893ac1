"""The demo: the whole pipeline on the embedded model and text, every file left to look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import moecollab as mc
from moecollab.demo.text import read_questions
from moecollab.embedded import MODEL
from moecollab.errors import DataError, OutputExistsError, SettingsError
from moecollab.manifest import write_bytes, write_json
from moecollab.progress import track

CRITERIA = ("coverage", "caep", "reap", "frequency", "random")
DROPS = (0.25, 0.5)
MARK = "demo.json"
"""File that tells a demo's folder from others."""
ATOMS = (24, 120)
"""Coarse and fine groups; with few documents, fewer than the default."""
DTYPE = "float32"
"""What the demo computes in; bfloat16 rounds, and is slow on processors without it."""
CHOSEN = "coverage-25"
"""The plan that is cut out in the end."""


def run_demo(
    out: Path | str, *, seed: int = 0, threads: int | None = None, overwrite: bool = False
) -> Path:
    """The path of the report of a full run on the embedded model and text.

    Parameters
    ----------
    out : path
        Folder for every file of the run.
    seed : int
        Seed of the fit and of the random control.
    threads : int or None
        Threads for the model and the fit; all cores if None. Activations, patterns, scores and
        plans do not depend on it, byte for byte.
    overwrite : bool
        Whether an earlier run in `out` may be replaced.

    Raises
    ------
    OutputExistsError
        If `out` holds a report and `overwrite` is not given.
    DataError
        If `out` holds something else than a demo.
    """
    out = Path(out)
    page = out / "report.html"
    if threads is not None and threads < 1:
        raise SettingsError("threads", threads, "at least 1")
    if page.exists() and not overwrite:
        raise OutputExistsError(page)
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise DataError(f"{out} holds other files than a demo's; choose another output")
    write_json(out / MARK, {"seed": seed}, overwrite=True)
    for name in ("scores", "plans", "evaluations"):  # perhaps of criteria that are no longer tried
        shutil.rmtree(out / name, ignore_errors=True)
    with _torch_threads(threads), track("demo", total=5) as bar:
        for step in _steps(out, seed, threads):
            bar.remark(step)
            bar.advance()
    return page


def _steps(out: Path, seed: int, threads: int | None) -> Iterator[str]:
    """Runs the pipeline, naming each step as it ends."""
    calibration, held_out = (
        _write_text(out / f"{name}.jsonl", documents)
        for name, documents in zip(("calibration", "held_out"), read_questions(), strict=True)
    )
    acts = mc.extract(
        MODEL,
        calibration,
        out=out / "activations",
        collect="shift",
        seed=seed,
        dtype=DTYPE,
        overwrite=True,
    )
    yield "extracted"
    collab = mc.HSDL(atoms=ATOMS, rows="sample", seed=seed, threads=threads).fit(acts)
    collab.save(out / "collaboration", overwrite=True)
    yield "fitted"
    plans = _plans(out, acts, collab, seed)
    yield "planned"
    _evaluate_plans(out, plans, held_out, seed)
    yield "evaluated"
    mc.prune(MODEL, plans[CHOSEN], out=out / "pruned", overwrite=True)
    mc.report(out / "report.html", run=out, title="moecollab demo", overwrite=True)
    yield "reported"


def _write_text(path: Path, documents: Sequence[dict[str, str]]) -> Path:
    """The documents as a .jsonl file."""
    lines = [json.dumps(document, sort_keys=True) for document in documents]
    write_bytes(path, ("\n".join(lines) + "\n").encode(), overwrite=True)
    return path


def _plans(
    out: Path, acts: mc.Activations, collab: mc.Collaboration, seed: int
) -> dict[str, mc.Plan]:
    """One plan per criterion and share, by name; the chosen one also as plan.json."""
    plans = {}
    for drop in DROPS:
        for criterion in CRITERIA:
            name = f"{criterion}-{round(100 * drop)}"
            scores = mc.score(
                criterion,
                acts,
                collaboration=collab if criterion == "caep" else None,
                drop=drop,
                seed=seed,
                out=out / "scores" / f"{name}.parquet",
                overwrite=True,
            )
            plans[name] = mc.plan(
                scores, drop=drop, per="layer", out=out / "plans" / f"{name}.json", overwrite=True
            )
    plans[CHOSEN].save(out / "plan.json", overwrite=True)
    return plans


def _evaluate_plans(out: Path, plans: dict[str, mc.Plan], held_out: Path, seed: int) -> None:
    """Held-out loss of the full model and of the model masked by each plan."""
    folder = out / "evaluations"
    mc.evaluate(
        MODEL, corpus=held_out, seed=seed, dtype=DTYPE, out=folder / "full.json", overwrite=True
    )
    with track("try plans", total=len(plans)) as bar:
        for name, plan in plans.items():
            with mc.mask(MODEL, plan, dtype=DTYPE) as masked:
                mc.evaluate(
                    masked,
                    corpus=held_out,
                    seed=seed,
                    name=name,
                    out=folder / f"{name}.json",
                    overwrite=True,
                )
            bar.advance()


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Gives torch this many threads for the time of the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
