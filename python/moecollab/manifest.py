"""Provenance and safe writing: what made a result, digests, atomic files and folders.

Every result is a folder or file with a manifest (format, version, command, settings, inputs with
digests, seed, versions of the packages that took part). Everything is written beside its target
and renamed, so a killed process leaves either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from moecollab.errors import DataError, OutputExistsError, SchemaError

MANIFEST = "manifest.json"
_PACKAGES = ("moecollab", "torch", "transformers", "polars", "numpy", "lm-eval")


def versions() -> dict[str, str]:
    """Versions of the packages that take part, without importing them."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def digest_bytes(data: bytes) -> str:
    """First 16 hex digits of the BLAKE2b digest of some bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def digest_json(value: object) -> str:
    """Digest of a JSON value, independent of key order."""
    return digest_bytes(dump_json(value))


def dump_json(value: object) -> bytes:
    """JSON bytes with sorted keys; floats round-trip; NaN is refused."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def write_bytes(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file whole or not at all."""
    refuse_existing(path, overwrite=overwrite)
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path) as file:
        file.write(data)


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is done; an older one is replaced."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object, *, overwrite: bool = False) -> None:
    """Writes a JSON file whole or not at all."""
    write_bytes(path, dump_json(value), overwrite=overwrite)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist") from cause
    except (ValueError, UnicodeDecodeError, RecursionError) as cause:
        raise DataError(f"{path} is not valid JSON; it may be truncated: make it again") from cause
    if not isinstance(value, dict):
        raise SchemaError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises when the output is there and may not be replaced.

    With `overwrite` a folder is replaced only if it is empty or one of our results.
    """
    if not path.exists():
        return
    if not overwrite:
        raise OutputExistsError(path)
    ours = any((path / name).is_file() for name in (MANIFEST, "moecollab.json"))
    if path.is_dir() and not ours and any(path.iterdir()):
        raise DataError(f"{path} is a folder that moecollab did not make; choose another output")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `target` that takes its place when the block ends well."""
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    scratch.chmod(0o755)
    try:
        yield scratch
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(scratch: Path, target: Path) -> None:
    """Puts a finished folder in the place of `target`; what was there goes last."""
    if not target.exists() and not target.is_symlink():
        scratch.replace(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    target.replace(old / "old")
    try:
        scratch.replace(target)
    except BaseException:
        (old / "old").replace(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def manifest(
    kind: str,
    version: int,
    *,
    settings: Mapping[str, object],
    inputs: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The manifest of one result: what it is, what made it and from what.

    `inputs` maps a name to the digest of that input. No time or machine is recorded, so that the
    same work gives the same bytes.
    """
    return {
        "kind": kind,
        "format": version,
        "settings": dict(settings),
        "inputs": dict(inputs or {}),
        "seed": seed,
        "versions": versions(),
    }


def check_manifest(found: Mapping[str, Any], kind: str, version: int, where: Path) -> None:
    """Raises SchemaError unless the manifest is of this kind and version."""
    if found.get("kind") != kind or found.get("format") != version:
        got = f"{found.get('kind')} version {found.get('format')}"
        raise SchemaError(f"{where} holds {got}; expected {kind} version {version}: make it again")
