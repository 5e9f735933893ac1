"""Parts of an evaluation that are done, kept beside its output until the whole is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moecollab.errors import DataError
from moecollab.manifest import digest_bytes, digest_json, read_json, write_bytes


class Stages:
    """Finished parts as plain data; a run that was killed finds them again.

    Parameters
    ----------
    out : path or None
        The evaluation's own file; nothing is kept without it.
    about : mapping
        Manifest of the evaluation. Parts of a run with another manifest are thrown away.
    """

    def __init__(self, out: Path | None, about: Mapping[str, Any]) -> None:
        self._folder = None if out is None else out.parent / f".{out.name}.partial"
        self._key = digest_json(about)

    def part(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 (JSON values)
        """A part as it was kept, or made and kept now."""
        if self._folder is None:
            return make()
        file = self._folder / f"{digest_bytes(name.encode())}.json"
        found = self._read(file)
        if found.get("key") == self._key and found.get("name") == name:
            return found["part"]
        made = make()
        whole = {"key": self._key, "name": name, "part": made}
        # Log-probabilities may be infinite, which the writer of results refuses.
        write_bytes(file, json.dumps(whole).encode(), overwrite=True)
        return made

    def clear(self) -> None:
        """Takes the parts away, once the whole is written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        """What a file of a part holds; nothing if it is not there or not whole."""
        try:
            return read_json(file)
        except DataError:
            return {}
