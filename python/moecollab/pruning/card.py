"""The README of a pruned checkpoint: what was dropped and why, what it costs, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moecollab.manifest import versions
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.keep import Keep
from moecollab.models.loading import ModelLike
from moecollab.models.uneven import Arrangement
from moecollab.pruning.costs import Row, cost_lines, read_costs
from moecollab.pruning.plans import Plan

CARD = "README.md"

_KEPT_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LEGAL = ("licen", "notice", "use_policy", "copying")


@dataclass(frozen=True)
class Size:
    """Numbers and bytes that the weights of a model take.

    Parameters
    ----------
    parameters : int
        Numbers stored; of packed weights, packs.
    n_bytes : int
        Their bytes.
    """

    parameters: int
    n_bytes: int

    @classmethod
    def of_model(cls, model: nn.Module) -> Size:
        """The size of a loaded model; what is tied counts once."""
        held = {id(one): one for one in model.state_dict(keep_vars=True).values()}.values()
        return cls(
            sum(one.numel() for one in held), sum(one.numel() * one.element_size() for one in held)
        )

    @classmethod
    def of_folder(cls, path: Path) -> Size:
        """The size of a checkpoint, from the headers of its files."""
        held = Checkpoint.open(str(path)).tensors.values()
        return cls.of([(one.shape, one.n_bytes) for one in held])

    @classmethod
    def of(cls, tensors: Sequence[tuple[tuple[int, ...], int]]) -> Size:
        """The size of tensors, given the shape and bytes of each."""
        return cls(sum(math.prod(shape) for shape, _ in tensors), sum(size for _, size in tensors))


@dataclass(frozen=True)
class About:
    """What a card tells that is known before anything is cut.

    Parameters
    ----------
    base : str
        Name of the model that is cut: of its folder, or on the hub.
    front : tuple of str
        Lines of YAML that hold on.
    plan : Plan, optional
        Why; without one, only what was dropped is told.
    costs : tuple of rows
        What evaluations measured.
    """

    base: str
    front: tuple[str, ...]
    plan: Plan | None
    costs: tuple[Row, ...]


@dataclass(frozen=True)
class Making:
    """What a card says was done, where that is not dropping alone.

    Parameters
    ----------
    done : str
        By what the model was made.
    title : str
        What the model has that its base has not; of numbers of experts if empty.
    heading : str
        That of the section with the reasons.
    lines : tuple of str
        More of that section.
    tag : str
        What the hub may find it by.
    planned : bool
        Whether a plan decided which experts are left.
    """

    done: str = "removing routed experts, without any training"
    title: str = ""
    heading: str = "What was dropped"
    lines: tuple[str, ...] = ()
    tag: str = "pruned"
    planned: bool = True


DROPPED = Making()


def about(
    model: ModelLike, keep: Keep, plan: Plan | None, evaluations: Sequence[Any] | None = None
) -> About:
    """What is known of a model, of a plan, and of what it costs.

    Raises
    ------
    DataError
        When an evaluation is missing or not whole, or of another model or plan.
    SchemaError
        When a file is no evaluation.
    """
    base = origin_of(model)
    source = Path(base)
    name = _folder_name(source.resolve()) if source.is_dir() else base
    costs = read_costs(evaluations or (), model, keep)
    return About(name, tuple(_front_matter(source / CARD)), plan, costs)


def origin_of(model: ModelLike) -> str:
    """Path or hub name that a model came from, or its class if it came from nowhere."""
    if isinstance(model, nn.Module):
        return str(getattr(model, "name_or_path", "") or type(model).__name__)
    return str(model)


def _folder_name(folder: Path) -> str:
    """Name of the model in a folder; in the hub's own cache, that on the hub."""
    cached = next((one.name for one in folder.parents if one.name.startswith("models--")), None)
    return folder.name if cached is None else cached.removeprefix("models--").replace("--", "/", 1)


def card(
    why: About, arrangement: Arrangement, sizes: tuple[Size, Size], making: Making = DROPPED
) -> str:
    """The text of README.md for a smaller checkpoint; `sizes` are before and after."""
    parts = [
        *_head(why, arrangement, making),
        *_sizes(arrangement, *sizes),
        *_reasons(why.plan, arrangement, making),
        *_layers(arrangement),
        *cost_lines(why.costs),
        *_loading(arrangement),
    ]
    return "\n".join(parts) + "\n"


def base_name(name: str) -> str:
    """Name that a file of the base has beside the card: its own READMEs step back."""
    return f"BASE_{name}" if re.fullmatch(rf"(BASE_)*{re.escape(CARD)}", name) else name


def of_the_base(source: Path) -> Iterator[Path]:
    """The READMEs and licence files of a model's folder; none of another path."""
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        legal = file.name.lower().startswith(_LEGAL)
        if file.is_file() and (legal or base_name(file.name) != file.name):
            yield file


def _front_matter(card: Path) -> list[str]:
    """Lines of the YAML at the head of a card that hold for what is made of the model as well."""
    if not card.is_file():
        return []
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    fences = [number for number, line in enumerate(lines) if line.strip() == "---"]
    if len(fences) < 2 or fences[0]:
        return []
    kept, taking = [], False
    for line in lines[1 : fences[1]]:
        if line[:1].strip() and not line.startswith(("-", "#")):  # a field, not more of the last
            taking = line.partition(":")[0].strip() in _KEPT_FIELDS
        if taking:
            kept.append(line)
    return kept


def _head(why: About, arrangement: Arrangement, making: Making) -> list[str]:
    fields, name = {line.partition(":")[0] for line in why.front}, why.base
    unknown = [] if "license" in fields else ["# license: that of the base model; state it here"]
    n_experts, counts = (_spread(held) for held in _counts(arrangement.keep))
    return [
        "---",
        *why.front,
        *unknown,
        f"base_model: {_quoted(name)}",
        f"tags: [mixture-of-experts, {making.tag}, moecollab]",
        "---",
        "",
        f"# {name} with {making.title or f'{counts} of {n_experts} experts a layer'}",
        "",
        f"Made from `{name}` by {making.done}, with moecollab {versions().get('moecollab', '')}.",
        "",
    ]


def _quoted(text: str) -> str:
    """Text as a YAML string, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _spread(counts: Iterable[int]) -> str:
    """Numbers of experts by layer, in words."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _counts(keep: Keep) -> tuple[list[int], list[int]]:
    """Experts of every layer before and after."""
    return list(keep.counts.values()), [len(kept) for kept in keep.keep.values()]


def _sizes(arrangement: Arrangement, before: Size, after: Size) -> list[str]:
    keep = arrangement.keep
    old, new = _counts(keep)
    rows = [
        ("MoE layers", len(keep.keep), len(keep.keep)),
        ("routed experts", sum(old), sum(new)),
        ("experts a layer", _spread(old), _spread(new)),
        ("experts a token", keep.top_k, keep.top_k),
        ("numbers stored", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("bytes of weights", f"{before.n_bytes:,}", f"{after.n_bytes:,}"),
    ]
    return ["| | before | after |", "| --- | --: | --: |"] + [
        f"| {name} | {old} | {new} |" for name, old, new in rows
    ]


def _reasons(plan: Plan | None, arrangement: Arrangement, making: Making) -> list[str]:
    lines = ["", f"## {making.heading}", "", *making.lines]
    if making.planned:
        made = arrangement.keep.settings
        criterion = made.get("criterion") if plan is None else plan.criterion
        lines.append(f"- **Criterion**: {criterion or 'not known: the kept experts were given'}.")
        lines += [] if plan is None else _plan_lines(plan)
    return [
        *lines,
        "- **Experts** that stayed, by the ids of the base: `experts` in `moecollab.json`; by "
        "those of the model before any cut, where the base was cut itself: `original`.",
    ]


def _plan_lines(plan: Plan) -> list[str]:
    """What a plan tells beside its criterion."""
    asked = {"drop": round(plan.drop, 6), "per": plan.per}
    asked |= {} if plan.budget is None else plan.budget.as_json()
    said = ", ".join(f"{name} {value}" for name, value in asked.items())
    lines = [f"- **Budget**: {said}."]
    protected = sum(map(len, plan.protected.values()))
    if protected:
        lines.append(f"- **Protected**: {protected} experts that had to stay.")
    if plan.sureness is not None:
        lines.append(f"- **Sureness**: those kept stay in {plan.sureness:.1%} of draws.")
    recorded = plan.activations or "no recording: from the weights alone, or not known"
    return [*lines, f"- **Calibration**: recording with digest {recorded}."]


def _layers(arrangement: Arrangement) -> list[str]:
    keep, dummies = arrangement.keep, arrangement.dummies
    lines = ["", "## Experts by layer", "", "| layer | before | after | padding |"]
    lines.append("| --: | --: | --: | --: |")
    for layer, kept in keep.keep.items():
        lines.append(
            f"| {layer} | {keep.counts[layer]} | {len(kept)} | {len(dummies.get(layer, []))} |"
        )
    return lines


def _loading(arrangement: Arrangement) -> list[str]:
    lines = ["", "## Loading", "", f"This checkpoint {arrangement.loads}.", "", "```python"]
    if arrangement.native:
        lines += ["import moecollab", "", 'model, tokenizer = moecollab.load_model("FOLDER")']
    else:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    lines.append("```")
    if not arrangement.native:
        lines += ["", "```", "vllm serve FOLDER", "```", "", "vLLM was not run when this was made."]
    return [
        *lines,
        "",
        "Limits: experts were judged on the calibration text; other languages, tasks and styles "
        "may lose more. Evaluate on what you need before you serve it.",
    ]
