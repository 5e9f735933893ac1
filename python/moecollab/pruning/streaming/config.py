"""Changing single values in the text of a configuration, of which all else stays as it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moecollab.errors import UnsupportedModelError
from moecollab.manifest import read_json
from moecollab.models.routing import find_moe_layers
from moecollab.models.uneven import ENTRY, Arrangement
from moecollab.pruning.counts import count_names, further_counts, holder_of, text_path
from moecollab.pruning.streaming.files import kept_files

_VALUE = r"(?:-?\d+|\[[^\[\]{}]*\]|null)"
_EXPERT_NAMED = re.compile(r"experts\.\d")


def smaller_config(
    path: Path,
    model: Any,  # noqa: ANN401 (transformers is untyped)
    arrangement: Arrangement,
    *,
    without_mtp: bool,
) -> str:
    """Text of ``config.json`` with another number of experts under every name it may have.

    Where layers hold different numbers, they are said too, and the text is laid out anew.

    Raises
    ------
    UnsupportedModelError
        When it, or one of the quantisation beside it, names single experts, whose numbers change.
    """
    text, value = path.read_text("utf-8"), read_json(path)
    _check_unnamed(path)
    layer = find_moe_layers(model)[0]
    names = count_names(model, layer)
    inside = (*text_path(model.config), *layer.layout.count.split(".")[:-1])
    place = inside if _at(value, inside) is not None else holder_of(value, names) or ()
    held = _at(value, place) or {}
    for name in sorted(names, key=lambda one: one not in held):  # those that are there first
        text = _with(text, (*place, name), arrangement.count, names)
    if without_mtp:
        for path_to in further_counts(value):
            text = _with(text, path_to, 0, ())
    entry = arrangement.config_entry()
    if not entry and ENTRY not in value:
        return text
    held = {name: one for name, one in json.loads(text).items() if name != ENTRY}
    return _dump(held | entry)


def _check_unnamed(path: Path) -> None:
    """Refuses configurations that name single experts."""
    beside = [name for name in kept_files(path.parent) if "quant" in name.lower()]
    for file in (path, *(path.parent / name for name in beside if name.endswith(".json"))):
        if _EXPERT_NAMED.search(file.read_text("utf-8", errors="replace")):
            raise UnsupportedModelError(
                f"{file} names single experts, whose numbers change when others go; take a "
                "checkpoint whose quantisation is the same for all experts"
            )


def _at(value: Any, path: Sequence[str]) -> dict[str, Any] | None:  # noqa: ANN401
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else None


def _with(text: str, path: Sequence[str], number: int, beside: Sequence[str]) -> str:
    """The text with a number at a place; a new name comes behind one of those it may be beside."""
    wanted = json.loads(text)
    held = _at(wanted, path[:-1])
    before = copy.deepcopy(held) or {}
    (wanted if held is None else held)[path[-1]] = number
    if path[-1] in before:
        changed = _replaced(text, path[-1], number)
    else:
        changed = (one for name in beside for one in _added(text, name, path[-1], number))
    for one in changed:
        if _loads(one) == wanted:
            return one
    return _dump(wanted)


def _dump(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replaced(text: str, name: str, number: int) -> Iterator[str]:
    """The text with the number in each of the places of that name."""
    for found in re.finditer(rf"({re.escape(json.dumps(name))}\s*:\s*){_VALUE}", text):
        yield text[: found.start()] + f"{found[1]}{number}" + text[found.end() :]


def _added(text: str, beside: str, name: str, number: int) -> Iterator[str]:
    """The text with a new name behind each of the places of another, indented as that is."""
    for found in re.finditer(rf"(\s*){re.escape(json.dumps(beside))}(\s*:\s*){_VALUE}", text):
        new = f",{found[1]}{json.dumps(name)}{found[2]}{number}"
        yield text[: found.end()] + new + text[found.end() :]


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
