"""Calibration text: documents with domains, read from files, datasets or plain lists."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import polars as pl

from moecollab.errors import DataError, SchemaError

SUFFIXES = (".txt", ".jsonl", ".parquet")
DEFAULT_DOMAIN = "text"


@dataclass(frozen=True)
class Document:
    """One piece of text that is read on its own, from its first token.

    Parameters
    ----------
    text : str
        The text, not blank.
    domain : str
        What the text is about; results are kept apart by it.
    id : str
        Unique within the corpus.
    """

    text: str
    domain: str = DEFAULT_DOMAIN
    id: str = ""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, none of them blank."""

    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        """Refuses a corpus without text."""
        if not self.documents:
            raise DataError(
                "the corpus holds no text; give at least one document that is not blank"
            )

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains that occur, in alphabetical order."""
        return tuple(sorted({document.domain for document in self.documents}))

    @cached_property
    def digest(self) -> str:
        """Digest of all texts and domains, in order."""
        state = hashlib.blake2b(digest_size=8)
        for document in self.documents:
            for part in (document.domain.encode(), document.text.encode()):
                state.update(len(part).to_bytes(8, "little"))
                state.update(part)
        return state.hexdigest()

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        counts = Counter(document.domain for document in self.documents)
        parts = ", ".join(f"{domain} {counts[domain]}" for domain in self.domains[:8])
        more = ", …" if len(self.domains) > 8 else ""
        return f"Corpus({len(self)} documents: {parts}{more})"


Source: TypeAlias = str | PathLike[str] | Corpus | Iterable[str | Mapping[str, object] | Document]


def read_corpus(source: Source) -> Corpus:
    """Documents of a file, a folder, a dataset or any iterable; blank ones are skipped.

    Parameters
    ----------
    source : path, Corpus, or iterable of str, mappings or Documents
        A ``.txt`` file is one document. ``.jsonl`` and ``.parquet`` have one document a row, with
        ``text`` and optionally ``domain`` and ``id``; so have mappings (a ``datasets.Dataset``,
        say). A folder stands for all such files in it, in the order of their paths. Where no
        domain is given it is the name of the subfolder, or else of the file (of the folder for
        ``.txt`` files beside each other).

    Raises
    ------
    DataError
        When nothing is left, or a file, line or row cannot be read; the line is named.

    Examples
    --------
    >>> read_corpus(["Two and two make four.", {"text": "Habeas corpus.", "domain": "law"}])
    Corpus(2 documents: law 1, text 1)
    """
    if isinstance(source, Corpus):
        return source
    if isinstance(source, str | PathLike):
        found = _from_path(Path(source))
    elif isinstance(source, Mapping):
        raise DataError(
            f"the corpus is a mapping with keys {sorted(map(str, source))[:5]}; "
            "pass one split of the dataset, or a list of documents"
        )
    else:
        found = _from_items(source)
    return Corpus(tuple(_unique(document for document in found if document.text.strip())))


def _from_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_text(file.relative_to(path))]
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file; add some text to it")
        for file in files:
            parts = file.relative_to(path).parts
            lone = path.resolve().name if file.suffix == ".txt" else file.stem
            domain = parts[0] if len(parts) > 1 else lone
            yield from _from_file(file, domain, "/".join(parts))
        return
    check_there(path)
    yield from _from_file(path, path.stem, path.name)


def check_there(source: object) -> None:
    """Raises DataError if text is given as a path where nothing is."""
    if isinstance(source, str | PathLike) and not Path(source).exists():
        raise DataError(
            f"corpus {source} does not exist; to pass text itself, give a list of strings"
        )


def _is_text(path: Path) -> bool:
    """Whether a file of a folder is read: by its suffix, and not hidden."""
    return path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _from_file(path: Path, domain: str, name: str) -> Iterator[Document]:
    if path.suffix == ".txt":
        yield _document({"text": _decoded(path)}, domain, name, str(path))
    elif path.suffix == ".jsonl":
        yield from _from_jsonl(path, domain, name)
    elif path.suffix == ".parquet":
        yield from _from_parquet(path, domain, name)
    else:
        raise DataError(f"{path} is not text we read; give one of {', '.join(SUFFIXES)}")


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise DataError(
            f"{path} is not UTF-8 text at byte {cause.start}; convert it to UTF-8"
        ) from cause


def _from_jsonl(path: Path, domain: str, name: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            except ValueError as cause:
                raise DataError(f"{where} is not valid JSON; repair or remove the line") from cause
            if not line.strip():
                continue
            if not isinstance(value, dict):
                raise DataError(f'{where} is not an object; write {{"text": …}} on each line')
            yield _document(value, domain, f"{name}:{number}", where)


def _from_parquet(path: Path, domain: str, name: str) -> Iterator[Document]:
    try:
        columns = pl.read_parquet_schema(path)
        wanted: list[str] = [name for name in ("text", "domain", "id") if name in columns]
        if "text" not in columns:
            raise SchemaError(f"{path} has no column 'text'; it has {', '.join(columns)}")
        table = pl.read_parquet(path, columns=wanted)
    except (pl.exceptions.PolarsError, OSError) as cause:
        raise DataError(f"{path} is not a readable Parquet file; write it again") from cause
    for number, row in enumerate(table.iter_rows(named=True), 1):
        yield _document(row, domain, f"{name}:{number}", f"{path} row {number}")


def _from_items(items: Iterable[str | Mapping[str, object] | Document]) -> Iterator[Document]:
    for number, item in enumerate(items, 1):
        where = f"document {number}"
        if isinstance(item, Document):
            fields: Mapping[str, object] = vars(item)
        elif isinstance(item, str):
            fields = {"text": item}
        elif isinstance(item, Mapping):
            fields = item
        else:
            raise DataError(
                f"{where} is a {type(item).__name__}; give strings or mappings with 'text'"
            )
        yield _document(fields, DEFAULT_DOMAIN, str(number), where)


def _document(fields: Mapping[str, object], domain: str, name: str, where: str) -> Document:
    """A checked document; `where` names it in errors."""
    text = fields.get("text")
    if not isinstance(text, str):
        got = type(text).__name__ if "text" in fields else f"only {sorted(map(str, fields))}"
        raise DataError(f"{where} has no string 'text' (got {got}); add one or remove it")
    label = fields.get("domain")
    if label is not None and not isinstance(label, str):
        raise DataError(f"{where} has domain {label!r}; a domain is a string")
    key = fields.get("id")
    try:
        # Half a surrogate pair is a valid JSON string but no text a tokenizer can read.
        text.encode()
        (label or "").encode()
    except UnicodeEncodeError as cause:
        raise DataError(
            f"{where} holds an unpaired surrogate at character {cause.start}; remove it"
        ) from cause
    return Document(text, label or domain, str(key) if key not in (None, "") else name)


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents; a repeated id gets a number behind it."""
    seen: set[str] = set()
    for document in documents:
        name, repeat = document.id, 1
        while name in seen:
            repeat += 1
            name = f"{document.id}#{repeat}"
        seen.add(name)
        yield document if name == document.id else replace(document, id=name)
