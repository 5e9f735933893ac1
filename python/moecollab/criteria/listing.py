"""All criteria as text: by what they read, and which to use."""

from __future__ import annotations

import re
from textwrap import wrap

from moecollab.criteria import get, names
from moecollab.criteria.base import KINDS, words_of

READS = {
    "no data": "the model's parameters, or nothing; no text is needed",
    "routing": "which experts the routers chose, or would have chosen",
    "outputs": "what the chosen experts put out, recorded in the same pass",
    "patterns": "groups of experts that fit learned from the recording",
    "model runs": "the model itself, run on text again",
}
"""What each kind of criteria reads, in the order of what it costs."""

ADVICE = (
    "For general use coverage, with a budget over the whole model if what loads the checkpoint "
    "takes other counts per layer; output_coverage where the shift cannot be recorded; where "
    "single tokens are not there, easy_ep. For one domain the same on text of that domain. Without "
    "text aimer, and the same share of each layer. random tells whether any of them is worth its "
    "trouble: moecollab compare measures it on your model."
)
"""Which criterion to use."""

_WIDTH, _INDENT = 100, 20


def kinds() -> dict[str, list[str]]:
    """Names of the criteria of each kind, alphabetical within a kind."""
    found: dict[str, list[str]] = {kind: [] for kind in reversed(KINDS)}
    for name in names():
        found[get(name).kind].append(name)
    return {kind: held for kind, held in found.items() if held}


def listing() -> str:
    """Every criterion with its needs, direction and source, and which to use."""
    parts = [
        "Criteria: of every layer, or of the model, the experts with the highest scores are kept."
    ]
    for kind, held in kinds().items():
        parts.append(f"{kind}: {READS[kind]}\n" + "\n".join(_entry(name) for name in held))
    advice = "\n".join(wrap(f"Which to use: {ADVICE}", _WIDTH))
    more = "Formulas, deviations and costs: docs/criteria.md. What cuts cost: docs/results.md."
    return "\n\n".join([*parts, f"{advice}\n{more}"])


def _entry(name: str) -> str:
    """A criterion in a few lines: what it is, then needs and direction, then its source."""
    found = get(name)
    form = found.form
    turned = form.get("direction", "").partition("; ")[2]  # why a published value is negated
    needs = "; ".join(filter(None, [f"needs {words_of(found.needs)}", turned]))
    lines = [form["summary"], *wrap(needs, 80), *wrap(short_source(form), 80)]
    indent = " " * _INDENT
    return f"  {name:{_INDENT - 2}}" + f"\n{indent}".join(lines).replace("``", "")


def short_source(form: dict[str, str]) -> str:
    """The source of a criterion, without remarks."""
    source = form.get("source", "no source given")
    cited = re.match(r".*?\(arXiv:[\d.]+\)", source)
    return cited[0] if cited else source.partition(";")[0]
