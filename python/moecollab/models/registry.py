"""Layouts by family: the built-in ones and those that users add."""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from types import CodeType

from moecollab.errors import SettingsError, UnsupportedModelError
from moecollab.manifest import digest_json
from moecollab.models.layout import BUILT_IN, REFUSED, Layout

_layouts: dict[str, Layout] = dict(BUILT_IN)


def register_layout(layout: Layout, *, replace: bool = False) -> None:
    """Makes a family known; a family that is known already needs ``replace=True``.

    Examples
    --------
    >>> from moecollab.models.layout import Layout
    >>> register_layout(Layout(family="my_moe", count="num_experts", rows=("gate.weight",)))
    >>> "my_moe" in families()
    True
    >>> unregister_layout("my_moe")
    """
    if layout.family in _layouts and not replace:
        raise SettingsError(
            "family", layout.family, "a family without a layout, or pass replace=True"
        )
    _layouts[layout.family] = layout


def unregister_layout(family: str) -> None:
    """Forgets what was registered for a family; the built-in layout comes back."""
    _layouts.pop(family, None)
    if family in BUILT_IN:
        _layouts[family] = BUILT_IN[family]


def families() -> tuple[str, ...]:
    """Names of all known families, sorted."""
    return tuple(sorted(_layouts))


def layout_of(model_type: str, class_name: str) -> Layout:
    """The layout of a ``model_type``; text parts of larger models are found as well.

    Raises
    ------
    UnsupportedModelError
        When the family is not known, with how to add it and known ones of a like name.
    """
    for name in (model_type, model_type.removesuffix("_text")):
        if name in _layouts:
            return _layouts[name]
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"{class_name} (model_type {model_type!r}) cannot be recorded: {REFUSED[model_type]}; "
            "choose a model of another family, see docs/models.md"
        )
    near = get_close_matches(model_type, families(), n=3)
    like = f" (a like name: {', '.join(near)})" if near else ""
    raise UnsupportedModelError(
        f"{class_name} (model_type {model_type!r}) is of a Mixture-of-Experts family that is not "
        "known; call moecollab.models.registry.register_layout(moecollab.models.layout.Layout("
        f"family={model_type!r}, count=<config field>, rows=<router tensors>)), as in the worked "
        f"examples of docs/models.md, which lists the known families{like}, and so does "
        "moecollab.models.registry.families()"
    )


def layout_digest(layout: Layout) -> str | None:
    """Digest of a layout that users registered, with its function's code; None of a built-in one.

    What the function reads beside its own code is not seen.
    """
    if BUILT_IN.get(layout.family) == layout:
        return None
    code = getattr(layout.routing, "__code__", None)
    return digest_json(asdict(layout) | {"routing": _digestible(code), "remark": ""})


def _digestible(value: object) -> object:
    """A function's code and constants as JSON values that are the same in every process."""
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, [_digestible(one) for one in value.co_consts]]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
