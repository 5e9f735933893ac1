"""Every criterion's cuts measured on held-out text, from one recorded pass a seed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from moecollab.errors import DataError, StaleInputError
from moecollab.evaluation.comparing.calibrating import Calibration
from moecollab.evaluation.comparing.comparison import CELLS, Comparison, load_comparison, tidy
from moecollab.evaluation.comparing.grid import DEFAULT, PLAIN, Grid, calibration, check_apart
from moecollab.evaluation.comparing.measuring import FULL, Bench, name_of
from moecollab.evaluation.comparing.notes import alike, warn_alike
from moecollab.evaluation.perplexity import HeldOut, window_of
from moecollab.evaluation.subject import Subject, open_subject
from moecollab.evaluation.tasks import Exam, load_tasks
from moecollab.manifest import MANIFEST, manifest, read_json, refuse_existing, write_json
from moecollab.models.applied import applied_to
from moecollab.patterns.dictionary import HSDL
from moecollab.progress import track
from moecollab.record.corpus import Corpus, Source, read_corpus
from moecollab.settings import check_whole, names_in

if TYPE_CHECKING:
    from moecollab.pruning.budgets import Per
    from moecollab.pruning.plans import Plan

KIND, FORMAT = "comparison", 1
EXTENDABLE = ("criteria", "drops", "per", "seeds")
"""Settings that may be others when a run goes on: what has been measured stays good."""


def compare(  # noqa: PLR0913 (one parameter per option of the command)
    model: Any,  # noqa: ANN401 (a path or a loaded model)
    corpus: Source,
    held_out: Source,
    *,
    out: str | PathLike[str],
    criteria: str | Sequence[str] | None = None,
    drops: float | Sequence[float] = (0.25, 0.5),
    per: str | Sequence[Per] = ("layer",),
    seeds: int = 3,
    share: float = 0.5,
    fits: HSDL | Mapping[str, HSDL] | None = None,
    tasks: str | Sequence[str] = (),
    task_folder: str | PathLike[str] | None = None,
    limit: int | None = None,
    probe_tokens: int = 8_192,
    context: int = 512,
    batch_size: int = 8,
    dtype: str = "auto",
    tokenizer: Any = None,  # noqa: ANN401 (any tokenizer)
    overwrite: bool = False,
) -> Comparison:
    """Criteria against each other, by what their cuts cost on text that did not calibrate.

    Each seed draws its own share of the calibration text, records it once for all criteria, scores
    and plans. Cuts are masks on the loaded model; cuts that keep the same experts are measured
    once. A run that was stopped goes on where it was when started again, and may be given other
    criteria, shares and budgets, and more seeds.

    Parameters
    ----------
    model : path or model
        A Mixture-of-Experts model.
    corpus : path or documents
        Calibration text, as for ``extract``.
    held_out : path or documents
        Text that judges; no document of it may be in `corpus`.
    out : path
        Folder for everything that is made.
    criteria : str or sequence of str, optional
        Names of criteria, such as "coverage,reap"; the best known if not given. A criterion of
        patterns may name one of several `fits`: ``caep@output``.
    drops : float or sequence of float
        Shares of the experts that go, in (0, 1).
    per : str or sequence of {"layer", "model"}
        What the share holds for; "layer,model" for both.
    seeds : int
        Calibrations, at least 1; two or more are needed to see how far a ranking can be trusted.
    share : float
        Share of the calibration documents that each seed draws from every domain, in (0, 1].
    fits : HSDL or mapping of name to HSDL, optional
        How patterns are fitted, for criteria that read them.
    tasks, task_folder, limit
        lm-eval tasks that every cut answers too, as for ``evaluate``.
    probe_tokens : int
        Most tokens of the calibration text on which a criterion runs the model again.
    context, batch_size, dtype, tokenizer
        As for ``evaluate``.
    overwrite : bool
        Whether a run with other settings in `out` is thrown away.

    Returns
    -------
    Comparison
        With tables of costs, intervals and ranks.

    Raises
    ------
    DataError
        When a held-out document calibrates too, or a cut has a loss that is not finite.
    MissingInputError
        When a criterion needs what this model's recording cannot have.
    StaleInputError
        When `out` holds a run with another model, text or other settings.

    Warns
    -----
    CalibrationWarning
        When the seeds calibrate on the same documents, so that intervals say little.
    """
    names = DEFAULT if criteria is None else criteria
    tried: dict[str, Any] = {"criteria": names, "drops": drops, "per": per}  # of any kind
    grid = Grid(**tried, seeds=seeds, share=share, fits=_named(fits))
    exams = names_in("tasks", tasks)
    _check_sizes(limit=limit, probe_tokens=probe_tokens, context=context, batch_size=batch_size)
    text, judge = read_corpus(corpus), read_corpus(held_out)
    check_apart(text, judge)
    questions = load_tasks(exams, task_folder, limit=limit) if exams else None
    subject = open_subject(model, tokenizer, dtype)
    if applied_to(subject.model):
        raise DataError(f"{subject.path} is masked already; compare criteria on the whole model")
    window = window_of(subject.model.config, context)
    settings = grid.as_json() | {"tasks": exams, "limit": limit, "context": window}
    settings |= {"probe_tokens": probe_tokens, "batch_size": batch_size}
    inputs = {"model": subject.digest, "corpus": text.digest, "held_out": judge.digest}
    inputs |= {} if questions is None else {"tasks": questions.digest}
    about = manifest(KIND, FORMAT, settings=settings, inputs=inputs)
    folder = _claim(Path(out), about, overwrite)
    warn_alike(grid, text)
    bench = Bench(
        folder=folder / "measured",
        model=subject.model,
        text=HeldOut.read(subject.tokenizer, judge, window),
        exam=None
        if questions is None
        else Exam(subject.model, subject.tokenizer, questions, batch_size=batch_size),
        batch_size=batch_size,
    )
    cells = _run(grid, text, subject, bench, folder, probe_tokens, window)
    tidy(cells, bench.folder).write(folder)
    known = read_json(folder / MANIFEST)["settings"]["fits"]
    about["settings"] = settings | {"fits": known}
    measured = _sizes(folder, text, grid)
    measured["task_folder"] = None if questions is None else questions.folder
    write_json(folder / MANIFEST, about | {"measured": measured}, overwrite=True)
    return load_comparison(folder)


def _named(fits: HSDL | Mapping[str, HSDL] | None) -> Mapping[str, HSDL]:
    if fits is None:
        return {PLAIN: HSDL()}
    return {PLAIN: fits} if isinstance(fits, HSDL) else fits


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None:
            check_whole(name, value, 2 if name == "context" else 1)


def _claim(folder: Path, about: Mapping[str, Any], overwrite: bool) -> Path:
    """The folder, new or of a run that measured the same text in the same way."""
    file = folder / MANIFEST
    if not file.exists():
        refuse_existing(folder, overwrite=overwrite)
    elif changed := _changed(before := read_json(file), about):
        if not overwrite:
            raise StaleInputError(
                f"{folder} holds a comparison with another {', '.join(changed)}; choose another "
                "output, or pass overwrite (--overwrite) to start anew"
            )
        shutil.rmtree(folder)
    else:  # until there are new tables it says what those of before hold; fits are added
        fits = before["settings"]["fits"] | about["settings"]["fits"]
        about = before | {"settings": before["settings"] | {"fits": fits}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(about), overwrite=True)
    return folder


def _changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of settings and inputs that differ, but for those that say how much is tried."""
    if (found.get("kind"), found.get("format")) != (wanted["kind"], wanted["format"]):
        return ["kind of result"]
    return [
        name
        for part in ("settings", "inputs")
        for name in wanted[part]
        if name not in EXTENDABLE and _differs(name, found.get(part, {}), wanted[part])
    ]


def _differs(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a setting differs; of fits, those that both runs read."""
    before, now = found.get(name), wanted[name]
    if name == "fits" and isinstance(before, Mapping):
        return any(before[fit] != now[fit] for fit in before.keys() & now.keys())
    if name == "tasks" and before is None:  # runs of before the questions' digest was kept
        return False
    return bool(before != now)


def _run(
    grid: Grid,
    text: Corpus,
    subject: Subject,
    bench: Bench,
    folder: Path,
    probe_tokens: int,
    context: int,
) -> pl.DataFrame:
    """Measures every cut that is not measured yet; a row per cell."""
    cells: list[dict[str, Any]] = []
    with track("comparing criteria", grid.cells + 1) as bar:
        bench.measure(FULL, None)
        bar.advance()
        for seed in range(grid.seeds):
            one = Calibration(
                folder=folder / f"seed-{seed}",
                seed=seed,
                grid=grid,
                corpus=calibration(text, grid.share, seed),
                model=subject.model,
                tokenizer=subject.tokenizer,
                probe_tokens=probe_tokens,
                context=context,
                batch_size=bench.batch_size,
            )
            for criterion, per, drop, plan in one.plans():
                bar.remark(f"seed {seed}, {criterion}, {drop:.1%} per {per}")
                cells.append(_measured(bench, plan, seed, criterion, per, drop))
                bar.advance()
    return pl.DataFrame(cells, schema=CELLS)


def _sizes(folder: Path, text: Corpus, grid: Grid) -> dict[str, Any]:
    """How large the model and the calibrations were, for the manifest."""
    made = [folder / f"seed-{seed}" / "activations" / MANIFEST for seed in range(grid.seeds)]
    recorded = [read_json(file) for file in made]
    calibrations = {
        "documents": [one["corpus"]["n_samples"] for one in recorded],
        "tokens": [one["corpus"]["n_tokens"] for one in recorded],
        "domains": len(text.domains),
        "alike": alike(grid, text),
    }
    about = {"model": recorded[0]["model"], "dtype": recorded[0]["settings"]["dtype"]}
    fit = next(iter(grid.fits), None)
    return about | {"fit": fit, "calibration": calibrations}


def _measured(
    bench: Bench, plan: Plan, seed: int, criterion: str, per: Per, drop: float
) -> dict[str, Any]:
    """One cell: what it is, and under which name its cut is measured."""
    name = name_of(plan)
    try:
        bench.measure(name, plan)
    except DataError as cause:
        raise DataError(f"{criterion} at {drop:.1%} per {per}, seed {seed}: {cause}") from cause
    return {
        "seed": seed,
        "criterion": criterion,
        "per": per,
        "drop": drop,
        "cut": name,
        "dropped": plan.n_dropped,
    }
