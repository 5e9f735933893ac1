"""Importing routing that other programs recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from os import PathLike, fspath
from pathlib import Path

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import digest_bytes, digest_file, refuse_existing
from moecollab.record.activations import Activations
from moecollab.record.counts import RoutingCounts
from moecollab.record.imports.checking import check
from moecollab.record.imports.counting import write_counts
from moecollab.record.imports.dump import CountDump, Options
from moecollab.record.imports.folder import write_activations
from moecollab.record.imports.kinds import SUFFIXES, reader

Paths = str | PathLike[str] | Iterable[str | PathLike[str]]


def import_routing(  # noqa: PLR0913 (the verb takes what the command takes)
    kind: str,
    files: Paths,
    *,
    out: str | PathLike[str],
    experts: int | None = None,
    top_k: int | None = None,
    layers: Sequence[int] | None = None,
    domain: str | None = None,
    prefill_only: bool = False,
    overwrite: bool = False,
) -> Activations | RoutingCounts:
    """Routing that another program recorded, as a folder of activations.

    What is left out or flagged is counted under ``imported`` in the manifest, by the rules of
    ``docs/importing.md``. Kinds without routing weights are stored with equal ones, and criteria
    that need weights refuse the result. Kinds that count without single tokens give
    :class:`RoutingCounts`, which can be scored but neither fitted nor mined.

    Parameters
    ----------
    kind : str
        What wrote the files; see ``docs/importing.md``.
    files : path or iterable of paths
        The files, or folders whose files are read in order of their names.
    out : path
        Folder for the result.
    experts : int, optional
        Routed experts per layer, where the files do not say; in [1, 65536].
    top_k : int, optional
        Experts per token and layer, where the files do not say.
    layers : sequence of int, optional
        The model's own indices of the layers in the files; 0, 1, 2 … if nothing says.
    domain : str, optional
        Domain of all samples; the files' own if None.
    prefill_only : bool
        Whether tokens that the model wrote itself are left out.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    DataError
        When a file is empty, damaged or breaks a rule; it names file, row and rule.
    SettingsError
        When neither the files nor the options say something that must be known.
    OutputExistsError
        When `out` is there and `overwrite` is false.
    """
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    read = reader(kind)
    options = Options(
        experts=experts,
        top_k=top_k,
        layers=None if layers is None else tuple(layers),
        domain=domain,
        prefill_only=prefill_only,
    )
    paths = _paths(files, SUFFIXES[kind])
    dump = read(paths, options)
    digest = digest_bytes("".join(digest_file(path) for path in paths).encode())
    settings = asdict(options) | {"layers": None if layers is None else list(layers)}
    if isinstance(dump, CountDump):
        about = {"kind": kind, "settings": settings, "inputs": {"files": digest}}
        return write_counts(dump, target, options, about, overwrite=overwrite)
    return write_activations(
        check(dump, options), target, source=kind, digest=digest, settings=settings
    )


def _paths(files: Paths, suffixes: tuple[str, ...]) -> list[Path]:
    """All files, those of a folder that end so in order of their names."""
    given = [files] if isinstance(files, str | PathLike) else list(files)
    if not given:
        raise SettingsError("files", given, "at least one file or folder")
    paths: list[Path] = []
    for one in given:
        path = Path(fspath(one))
        if path.is_dir():
            inside = sorted(found for found in path.iterdir() if found.suffix in suffixes)
            paths.extend(inside)
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path} does not exist; give files that were recorded")
    if not paths:
        raise DataError(f"{given[0]} holds no files that end in {' or '.join(suffixes)}")
    return paths
