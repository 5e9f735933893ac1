"""How the results were made: settings, digests, versions and the commands to repeat them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moecollab import criteria
from moecollab.criteria.base import Needs
from moecollab.record.activations import Activations
from moecollab.reporting.material import Material


@dataclass(frozen=True)
class Made:
    """One result: what it is, and what its manifest says."""

    what: str
    seed: str
    settings: str
    inputs: str


def made(material: Material) -> list[Made]:
    """One line per result, in the order of the data flow."""
    found = []
    if material.activations is not None:
        found.append(_made("activations", material.activations.manifest))
    if material.collaboration is not None:
        collab = material.collaboration
        origin = {"activations": collab.activations} if collab.activations else {}
        found.append(_made("collaboration", {"settings": collab.settings, "inputs": origin}))
    for scores in material.scores:
        origin = {"activations": scores.activations} if scores.activations else {}
        about = {"settings": scores.settings, "inputs": origin}
        found.append(_made(f"scores: {scores.criterion}", about))
    if material.plan is not None:
        found.append(_made("plan", material.plan.as_json()))
    for name, evaluation in material.evaluations.items():
        found.append(_made(f"evaluation: {name}", evaluation.about))
    return found


def same_text(material: Material) -> bool | None:
    """Whether loss was measured on the text that was recorded; None if that cannot be told."""
    if material.activations is None:
        return None
    recorded = material.activations.manifest.get("inputs", {}).get("corpus")
    measured = {
        found.about.get("inputs", {}).get("corpus") for found in material.evaluations.values()
    }
    return None if recorded is None or None in measured else recorded in measured


def versions(material: Material) -> dict[str, str]:
    """Versions of the packages that made the first result there is."""
    manifests: list[Mapping[str, Any]] = []
    if material.activations is not None:
        manifests.append(material.activations.manifest)
    manifests += [evaluation.about for evaluation in material.evaluations.values()]
    if material.plan is not None:
        manifests.append(material.plan.as_json())
    return dict(manifests[0].get("versions", {})) if manifests else {}


def commands(material: Material) -> list[str]:
    """Commands that repeat the run; the text's path is for the reader to fill in."""
    return list(_commands(material))


def _commands(material: Material) -> Iterator[str]:
    acts, collab, plan = material.activations, material.collaboration, material.plan
    model = "MODEL" if acts is None else str(acts.manifest["model"].get("path") or "MODEL")
    model = shlex.quote(model)
    if acts is not None:
        yield _recording(acts, model)
    if collab is not None:
        atoms = ",".join(str(len(level.atoms)) for level in collab.levels)
        options = _options(collab.settings, ("sparsity", "reconstruction", "rows", "weights"))
        yield (
            f"fit run/activations --out run/collaboration --atoms {atoms}{options}"
            f"{_seed(collab.settings)}"
        )
    if plan is not None:
        name = shlex.quote(plan.criterion)
        needs = " --collaboration run/collaboration" if _reads_patterns(plan.criterion) else ""
        asked = {"drop": plan.drop} if plan.budget is None else plan.budget.as_json()
        if plan.sureness is None:
            made = f"score run/activations --criterion {name}{needs} --drop {plan.drop}"
        else:
            budget = _options(asked, ("drop", "experts", "mass", "floor"))
            how = ("folds", "resamples", "confidence", "seed")
            drawn = _options(_drawn(material, plan.criterion), how)
            made = f"uncertainty run/activations --criterion {name}{needs}{budget} --per {plan.per}"
            made += drawn
        yield f"{made} --out run/scores.parquet"
        named = _options(asked, ("drop", "experts", "mass", "memory_gb", "floor"))
        model_named = f" --model {model}" if "memory_gb" in asked else ""
        yield f"plan run/scores.parquet{named} --per {plan.per}{model_named} --out run/plan.json"
        yield f"mask {model} run/plan.json --out run/masked"
    if material.evaluations:
        yield f"evaluate {model} --corpus HELD_OUT --out run/evaluations/full.json"
        yield "evaluate run/masked --corpus HELD_OUT --out run/evaluations/masked.json"
    yield "report run --out run/report.html"


def _drawn(material: Material, criterion: str) -> Mapping[str, Any]:
    """How documents were drawn for the scores of a criterion, if these are at hand."""
    spreads = (one.spread for one in material.scores if one.criterion == criterion)
    found = next((one.settings for one in spreads if one is not None), {})
    folds = set(found.get("folds", []))  # of each recording
    return {**found, "folds": folds.pop() if len(folds) == 1 else None}


def _recording(acts: Activations, model: str) -> str:
    """The command that made the activations."""
    settings = acts.manifest["settings"]
    if "imported" in acts.manifest:
        kind = shlex.quote(acts.manifest["imported"]["kind"])
        known = _options(settings, ("experts", "top_k", "domain"))
        return f"import {kind} FILES --out run/activations{known}"
    options = _options(settings, ("tokens", "context", "folds"))
    groups = [group for group in settings.get("collect") or () if group not in ("routing", "norms")]
    options += f" --collect {','.join(groups)}" if groups else ""
    return f"extract {model} TEXT --out run/activations{options}{_seed(acts.manifest)}"


def _options(settings: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Command-line options of the settings that have a value, which is read back exactly."""
    known = [(name, settings.get(name)) for name in names]
    return "".join(f" {option(name, value)}" for name, value in known if value is not None)


def option(name: str, value: object) -> str:
    """An option as the command line reads it; all digits of a number are there."""
    return f"--{name.replace('_', '-')} {shlex.quote(str(value))}"


def _seed(about: Mapping[str, Any]) -> str:
    return f" --seed {about['seed']}" if about.get("seed") is not None else ""


def _made(what: str, about: Mapping[str, Any]) -> Made:
    settings = about.get("settings", {})
    seed = about.get("seed", settings.get("seed"))
    shown = {name: value for name, value in settings.items() if name != "seed"}
    return Made(
        what=what,
        seed="" if seed is None else str(seed),
        settings=", ".join(f"{name} {_plain(value)}" for name, value in shown.items()),
        inputs=", ".join(f"{name} {digest}" for name, digest in about.get("inputs", {}).items()),
    )


def _plain(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def _reads_patterns(name: str) -> bool:
    """Whether a criterion needs patterns; one that is not registered here is taken not to."""
    return name in criteria.names() and Needs.COLLABORATION in criteria.get(name).needs
