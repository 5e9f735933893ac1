"""Templates of pages, and what every page holds."""

from __future__ import annotations

import json

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup


def template(name: str) -> Template:
    """A template of the package; what it shows is escaped, and a name it lacks is an error."""
    environment = Environment(
        loader=PackageLoader("moecollab.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def script_json(values: dict[str, float]) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(values, sort_keys=True, indent=0, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
