"""The head-to-head of criteria: every cut's cost on held-out text and tasks, per model.

``python benches/study_criteria.py run MODEL DATA --work DIR --criteria …`` measures (hours; a
stopped run goes on), ``… tables DIR…`` writes the Markdown of docs/results.md. MODEL is
``embedded`` or the folder of a model made by ``benches/models``; DATA holds ``corpus/`` and
``facts/``. Calibration pieces come from documents that the embedded model was trained on, held-out
pieces from documents that it never saw; each seed calibrates on its own half of the pieces.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

import moecollab as mc
from moecollab.demo import MODEL
from moecollab.demo.training_text import TrainingText, read_training_text
from moecollab.progress import show

DROPS = (0.125, 0.25, 0.5, 0.75)
PIECE = 1_000  # characters of a calibration piece, some 300 tokens
PIECES = 24  # of each domain
HELD_OUT_PIECE, HELD_OUT_PIECES = 600, 5  # of each domain
ALONE = 8
"""Times as many pieces of a domain that is studied alone."""
QUESTIONS = 100
BUDGETS = {"layer": "The same share in each layer", "model": "The share over the whole model"}
FITS = {
    "patterns": mc.HSDL(atoms=(64, 128), rows="sample"),
    "token": mc.HSDL(atoms=(256,), rows="token"),
    "output": mc.HSDL(atoms=(64, 128), rows="sample", weights="output"),
}
app = typer.Typer(help=__doc__)


def pieces(
    texts: list[str], n: int, size: int, rng: np.random.Generator, draw: int = 0
) -> list[str]:
    """Pieces of some documents, from places drawn at random, none from the same place."""
    places = [(i, at) for i, text in enumerate(texts) for at in range(0, len(text), size)]
    chosen = rng.permutation(len(places))[4 * n * draw : 4 * n * (draw + 1)]
    cut = [texts[i][at : at + size] for i, at in (places[j] for j in chosen)]
    return [piece for piece in cut if len(piece.strip()) > size // 3][:n]


def corpora(
    text: TrainingText, only: str = "", n_held_out: int = HELD_OUT_PIECES, draw: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Calibration and held-out pieces of every domain, or of one, of which there are more.

    No piece of one draw is in another.
    """
    times = ALONE if only else 1
    found: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for part, source, n, size in (
        (0, text.train, PIECES, PIECE),
        (1, text.held_out, n_held_out, HELD_OUT_PIECE),
    ):
        rng = np.random.default_rng(part)
        for domain, texts in source.items():
            if only in ("", domain):
                cut = pieces(texts, n * times, size, rng, draw)
                found[part].extend({"text": piece, "domain": domain} for piece in cut)
    return found


FACTS_YAML = """
task: facts_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_facts(data: Path, folder: Path) -> list[str]:
    """A task per kind of facts: which of four objects of the relation belongs to the subject."""
    facts = pl.read_parquet(data / "facts" / "facts.parquet").drop_nulls("kind")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for kind in sorted(facts["kind"].unique()):
        rng, own = np.random.default_rng(0), facts.filter(kind=kind)
        objects = {
            relation: sorted(part["object"].unique())
            for (relation,), part in own.group_by("relation")
        }
        rows = []
        for at in rng.permutation(own.height).tolist():
            fact = own.row(at, named=True)
            others = [o for o in objects[fact["relation"]] if o != fact["object"]]
            if len(others) < 3:
                continue
            choices = [fact["object"], *rng.choice(others, 3, replace=False).tolist()]
            order = rng.permutation(4).tolist()
            rows.append(
                {
                    "prompt": fact["prompt"].strip(),
                    "choices": [choices[i].strip() for i in order],
                    "answer": order.index(0),
                }
            )
        file = folder / f"{kind}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows[:1_000])))
        (folder / f"{kind}.yaml").write_text(FACTS_YAML.format(kind=kind, data=file.resolve()))
        names.append(f"facts_{kind}")
    return names


def variants() -> None:
    """Registers the criteria that are studied but not shipped."""
    path = Path(__file__).with_name("pattern_variants.py")
    spec = importlib.util.spec_from_file_location("pattern_variants", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register_variants()


@app.command()
def run(  # noqa: PLR0913 (one parameter per option)
    model: Annotated[str, typer.Argument(help="embedded, or a folder")],
    data: Annotated[Path, typer.Argument(help="Folder with corpus/ and facts/")],
    work: Annotated[Path, typer.Option(help="Folder of the run")],
    criteria: Annotated[str, typer.Option(help="Names between commas")],
    drops: Annotated[str, typer.Option(help="Shares between commas")] = ",".join(map(str, DROPS)),
    per: Annotated[str, typer.Option(help="layer, model or both")] = "layer,model",
    seeds: Annotated[int, typer.Option(help="Calibrations")] = 5,
    tasks: Annotated[str, typer.Option(help="facts, or lm-eval tasks between commas")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens on which criteria run the model")] = 8_192,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass")] = 32,
    domain: Annotated[str, typer.Option(help="Calibrate and judge on this one alone")] = "",
    n_held_out: Annotated[int, typer.Option(help="Held-out pieces a domain")] = HELD_OUT_PIECES,
    draw: Annotated[int, typer.Option(help="Another number, other pieces of text")] = 0,
    questions: Annotated[int, typer.Option(help="Of each task")] = QUESTIONS,
) -> None:
    """Measures; a stopped run goes on."""
    variants()
    calibration, held_out = corpora(read_training_text(data), domain, n_held_out, draw)
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "tasks"
    asked = write_facts(data, folder) if tasks == "facts" else [t for t in tasks.split(",") if t]
    with show():
        found = mc.compare(
            MODEL if model == "embedded" else model,
            calibration,
            held_out,
            out=work / "comparison",
            criteria=criteria.split(","),
            drops=[float(drop) for drop in drops.split(",")],
            per=per.split(","),
            seeds=seeds,
            share=0.5,
            fits=FITS,
            tasks=asked,
            task_folder=folder if tasks == "facts" else None,
            limit=questions if asked else None,
            probe_tokens=tokens,
            batch_size=batch_size,
            dtype="float32",
        )
    typer.echo(found)


def markdown(found: mc.Comparison, measure: str, per: str) -> str:
    """A table: criterion, then cost, interval and rank at each share; the best on average first."""
    table = found.standings(measure).filter(per=per)
    drops = table["drop"].unique().sort().to_list()
    middle = table.filter(pl.col("drop").is_in([0.25, 0.5]) | (len(drops) < 2))
    order = middle.group_by("criterion").agg(pl.col("rank").mean()).sort("rank", "criterion")
    lines = [
        "| criterion | " + " | ".join(f"{drop:.1%}".replace(".0%", "%") for drop in drops) + " |",
        "| --- |" + " --- |" * len(drops),
    ]
    for name in order["criterion"]:
        cells = []
        for drop in drops:
            row = table.filter(criterion=name, drop=drop).row(0, named=True)
            rank = f" {row['rank']:.1f}" if measure == "loss" else ""
            cells.append(f"{row['cost']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{rank}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *found.notes(measure)])


@app.command()
def tables(
    works: Annotated[list[Path], typer.Argument(help="Folders of runs")],
    reference: Annotated[str | None, typer.Option(help="Criterion to hold others against")] = None,
) -> None:
    """Markdown of every measure and budget."""
    for work in works:
        found = mc.load_comparison(work / "comparison")
        for measure in found.measures:
            for per in found.cells["per"].unique(maintain_order=True):
                print(f"\n### {BUDGETS[per]}: {measure}\n\n{markdown(found, measure, per)}")
                if reference is not None:
                    print(f"\n{held_against(found, measure, per, reference)}")


def held_against(found: mc.Comparison, measure: str, per: str, reference: str) -> str:
    """How much more each criterion's cuts cost than the reference's."""
    table = found.standings(measure, reference=reference).filter(per=per)
    lines = [f"More than {reference}:", ""]
    for (drop,), part in table.group_by("drop", maintain_order=True):
        gaps = ", ".join(
            f"{row['criterion']} {row['difference']:+.3f} "
            f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
            for row in part.iter_rows(named=True)
            if row["criterion"] != reference
        )
        lines.append(f"- {drop:.1%}: {gaps}")
    return "\n".join(lines)


@app.command()
def overlap(
    work: Annotated[Path, typer.Argument(help="Folder of a run")],
    reference: Annotated[str, typer.Option(help="Criterion to hold others against")] = "coverage",
) -> None:
    """Which part of what the reference drops is dropped by others, and by it from other text."""
    variants()
    found = mc.load_comparison(work / "comparison")
    n_seeds = found.cells["seed"].n_unique()
    for per, drop in found.cells.select("per", "drop").unique(maintain_order=True).iter_rows():
        gone = {
            name: [_gone(work, name, seed, per, drop) for seed in range(n_seeds)]
            for name in found.cells["criterion"].unique(maintain_order=True)
        }
        own = gone.pop(reference)
        shares = {"itself, from other text": _alike(own[1:], own[:-1])}
        shares |= {name: _alike(own, others) for name, others in gone.items()}
        print(f"{drop:.1%} per {per}: " + ", ".join(f"{k} {v:.2f}" for k, v in shares.items()))


def _gone(work: Path, name: str, seed: int, per: str, drop: float) -> set[tuple[int, int]]:
    """Layer and expert of all that a criterion drops."""
    asked, _, fit = name.partition("@")
    read = f"@{fit or next(iter(FITS))}" if mc.criteria.get(asked).kind == "patterns" else ""
    folder = work / "comparison" / f"seed-{seed}" / "scores"
    files = (folder / f"{asked}{read}{ending}.parquet" for ending in ("", f"-{drop:g}"))
    made = mc.plan(mc.load_scores(next(f for f in files if f.exists())), drop=drop, per=per)
    everyone = range(made.n_experts)
    return {(layer, e) for layer, kept in made.keep.items() for e in set(everyone) - set(kept)}


def _alike(first: list[set], second: list[set]) -> float:
    pairs = zip(first, second, strict=True)
    return float(np.mean([len(one & other) / len(one) for one, other in pairs]))


if __name__ == "__main__":
    app()
