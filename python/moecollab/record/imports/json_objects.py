"""JSON files of objects, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moecollab.errors import DataError
from moecollab.record.imports.dump import read_bytes


def read_objects(paths: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """File, place and value of each object: an object a line, one object, or a list of them."""
    for path in paths:
        data = read_bytes(path)
        if path.suffix == ".jsonl":
            lines = [(f"{path} line {at + 1}", line) for at, line in enumerate(data.splitlines())]
            values = [(where, _parse(line, where)) for where, line in lines if line.strip()]
        else:
            whole = _parse(data, str(path))
            several = whole if isinstance(whole, list) else [whole]
            values = [(f"{path} object {at}", value) for at, value in enumerate(several)]
        if not values:
            raise DataError(f"{path} is empty; record the routing again")
        for where, value in values:
            yield path, where, as_object(value, where)


def _parse(data: bytes, where: str) -> Any:  # noqa: ANN401 (any JSON value)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as cause:
        raise DataError(
            f"{where} is not valid JSON; it may be truncated: record it again"
        ) from cause


def as_object(value: object, where: str) -> dict[str, Any]:
    """The value, which must be a JSON object."""
    if not isinstance(value, dict):
        raise DataError(
            f"{where} holds {type(value).__name__}, expected an object; record it again"
        )
    return value


def as_list(value: object, where: str) -> list[Any]:
    """The value, which must be a JSON list."""
    if not isinstance(value, list):
        raise DataError(f"{where} holds {type(value).__name__}, expected a list; record it again")
    return value


def as_count(value: object, where: str) -> int | None:
    """The value, which must be a whole number of at least 0 or missing."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{where} holds {value!r} where a count belongs; record it again")
    return value
