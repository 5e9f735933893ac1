"""Entry point of the command line: shows progress, turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import logging
import sys
import warnings

import typer

from moecollab.cli import verbs
from moecollab.errors import MoeCollabError

app = typer.Typer(
    name="moecollab",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="See how the experts of a Mixture-of-Experts LLM work together; remove those that do not "
    "matter.\n\nStart with: moecollab demo",
)
for verb in verbs.VERBS:
    app.command(verb.__name__.removesuffix("_"))(verb)


def main() -> None:
    """Runs one command; exit code 0, 1 (our error, one line), 2 (usage) or 130 (Ctrl-C)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    try:
        app()
    except MoeCollabError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped; what was finished is kept, and the same command goes on from there", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = error.filename or "the output"
        _fail(f"{where}: {error.strerror}; free space or choose another output", 1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line for a warning, without the source line."""
    sys.stderr.write(f"warning: {message}\n")


def _fail(message: str, code: int) -> None:
    """Prints one line to stderr and leaves."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(code)
