"""The command that imports routing that other programs recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import moecollab as mc
from moecollab import progress
from moecollab.cli.options import Out, Overwrite
from moecollab.errors import SettingsError


def import_(  # noqa: PLR0913 (one parameter per option)
    kind: Annotated[str, typer.Argument(help="What wrote the files; see docs/importing.md")],
    files: Annotated[list[Path], typer.Argument(help="Files, or folders of files")],
    out: Out,
    experts: Annotated[int | None, typer.Option(help="Routed experts per layer")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token and layer")] = None,
    layers: Annotated[
        str | None, typer.Option(help="The model's own layer indices: 1-26 or 0,2,4")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Domain of all samples")] = None,
    prefill_only: Annotated[
        bool,
        typer.Option("--prefill-only/--keep-decode", help="Leave out tokens that the model wrote"),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Imports routing that a serving engine or another program recorded.

    Example: moecollab import vllm responses.jsonl --experts 128 --out run/activations
    """
    with progress.show():
        found = mc.import_routing(
            kind,
            files,
            out=out,
            experts=experts,
            top_k=top_k,
            layers=_indices(layers),
            domain=domain,
            prefill_only=prefill_only,
            overwrite=overwrite,
        )
    rules = found.manifest["imported"]["findings"]
    seen = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in rules.items())
    typer.echo(f"{out}: {found!r}; {seen or 'nothing unusual'}")


def _indices(text: str | None) -> tuple[int, ...] | None:
    """Whole numbers and ranges between commas."""
    if text is None:
        return None
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    except ValueError as cause:
        raise SettingsError("layers", text, "indices or ranges, such as 1-26 or 0,2,4") from cause
    return tuple(found)
