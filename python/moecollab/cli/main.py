"""Entry point of the command line: shows progress, turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated

import typer

from moecollab import __version__
from moecollab.cli import verbs
from moecollab.errors import MoeCollabError

_FILE_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR)


def main() -> None:
    """Runs one command; exit code 0, 1 (our error, one line), 2 (usage) or 130 (Ctrl-C)."""
    # MKL otherwise rounds small products differently for other numbers of threads, and a recording
    # would depend on them; it must be told before torch is imported.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    # Threads that spin while they wait starve each other when cores are busy with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps code for 1,024 shapes, which experts fill with 0.3 GB that is hardly used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    app()


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with its errors as one line on stderr."""

    @wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        try:
            verb(*arguments, **options)
        except MoeCollabError as error:
            _fail(str(error), 1)
        except KeyboardInterrupt:
            _fail(
                "stopped; nothing half-written is left, and extract and long fits go on where they "
                "were",
                130,
            )
        except OSError as error:
            if error.errno not in _FILE_ERRORS:
                raise
            where = error.filename or "the output"
            _fail(f"{where}: {error.strerror}; check the path, its rights and the space left", 1)

    return run


app = typer.Typer(
    name="moecollab",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="See how the experts of a Mixture-of-Experts LLM work together; remove those that do not "
    "matter.\n\nStart with: moecollab demo",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moecollab {__version__}")
        raise typer.Exit


@app.callback()
def _before_any(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Takes the options that belong to no command."""


for _verb in verbs.VERBS:
    app.command(verbs.command_name(_verb))(_guarded(_verb))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line for a warning, without the source line."""
    sys.stderr.write(f"warning: {message}\n")


def _fail(message: str, code: int) -> None:
    """Prints one line to stderr and leaves."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(code)
