"""Routing of one request to a server, brought into line with its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecollab.errors import DataError, ShapeError
from moecollab.record.imports.dump import Dump, Findings, Piece

MAX_POSITION = 2**32 - 1  # positions are stored as uint32


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a response says about its tokens.

    Parameters
    ----------
    n_prompt, n_generated : int or None
        Numbers of tokens, where the response says.
    prompt, generated : uint32 array or None
        Their ids, where the response says.
    """

    n_prompt: int | None
    n_generated: int | None
    prompt: NDArray[np.uint32] | None = None
    generated: NDArray[np.uint32] | None = None

    @property
    def total(self) -> int | None:
        """Prompt and generated tokens."""
        if self.n_prompt is None or self.n_generated is None:
            return None
        return self.n_prompt + self.n_generated

    def allowed(self, start: int = 0) -> tuple[int, ...]:
        """Numbers of rows that fit, the last token being run through the model or not."""
        if self.total is None or self.n_generated is None:
            return ()
        ends = {self.total - start, self.total - 1 - start}
        return tuple(sorted(ends | {self.n_generated, self.n_generated - 1} - {-1}))

    def ids(self) -> NDArray[np.uint32] | None:
        """Ids of all tokens."""
        if self.prompt is None or self.generated is None:
            return None
        return np.concatenate([self.prompt, self.generated])


@dataclass(frozen=True, kw_only=True)
class Request:
    """The routing that one answer to a prompt holds.

    Parameters
    ----------
    where, file, domain : str
        As in :class:`Piece`.
    tokens : Tokens
        What is known of its tokens.
    prompt_rows, rows : integer array of shape (n_rows, n_layers, top_k), or None
        Routing of the prompt if it comes apart, and of the rest or of all.
    start : int
        Position of the first row, where the response says that earlier ones were cut.
    first : bool
        Whether this is the first answer to its prompt.
    """

    where: str
    file: str
    domain: str
    tokens: Tokens
    prompt_rows: NDArray[Any] | None
    rows: NDArray[Any] | None
    start: int = 0
    first: bool = True

    def piece(self, findings: Findings) -> Piece | None:
        """The routing of the request's tokens, or None where it holds none.

        Raises
        ------
        DataError
            When the rows are neither as many as the tokens nor one fewer.
        """
        if self.rows is None and self.prompt_rows is None:
            findings.samples_without_routing += 1
            return None
        ids, start = self._joined()
        self._check_length(start + len(ids), findings)
        skip = 0
        if not self.first and self.tokens.n_prompt is not None:
            skip = max(0, self.tokens.n_prompt - start)
            findings.shared_prompts += int(skip > 0)
        position = np.arange(start + skip, start + len(ids))
        n_prompt, known = self.tokens.n_prompt, self.tokens.ids()
        return Piece(
            where=self.where,
            file=self.file,
            domain=self.domain,
            ids=ids[skip:],
            token_ids=None if known is None else known[position],
            positions=position.astype(np.uint32),
            generated=None if n_prompt is None else position >= n_prompt,
        )

    def _joined(self) -> tuple[NDArray[Any], int]:
        """All rows and the position of the first."""
        prompt, rows = self.prompt_rows, self.rows
        if rows is None or prompt is None:
            only = prompt if rows is None else rows
            return np.asarray(only), self._start(len(np.asarray(only)))
        if prompt.shape[1:] != rows.shape[1:]:
            raise ShapeError(
                f"{self.where} has rows of {prompt.shape[1:]} for the prompt and {rows.shape[1:]} "
                "for the rest; record it again"
            )
        if self.tokens.n_prompt not in (None, len(prompt)):
            raise DataError(
                f"{self.where} has {len(prompt)} rows for {self.tokens.n_prompt} prompt tokens; "
                "record it again"
            )
        return np.concatenate([prompt, rows]), 0

    def _start(self, n_rows: int) -> int:
        """Where the rows begin: at the start, or after the prompt if that alone fits."""
        tokens = self.tokens
        if self.start or tokens.total is None or self.prompt_rows is not None:
            return self.start
        whole = n_rows in (tokens.total, tokens.total - 1)
        apart = n_rows in (tokens.n_generated, (tokens.n_generated or 0) - 1)
        return int(tokens.n_prompt or 0) if apart and not whole else 0

    def _check_length(self, end: int, findings: Findings) -> None:
        """Raises unless the rows end with the tokens or one before."""
        total = self.tokens.total
        if self.rows is None and end != (total or 0) - 1:
            total = self.tokens.n_prompt  # the server lost what it routed of the answer
        if total is None and end <= MAX_POSITION:
            return
        if total is None or end not in (total, total - 1):
            raise DataError(
                f"{self.where} has routing up to token {end} of {total}, expected all tokens or "
                "all but the last; the rows belong to another request or were cut: record it again"
            )
        findings.last_token_absent += int(end == total - 1)


def dump_of(requests: Iterable[Request]) -> Dump:
    """The pieces of some requests that hold any rows, and what was found on the way."""
    findings = Findings()
    found = [request.piece(findings) for request in requests]
    pieces = [piece for piece in found if piece is not None and len(piece.ids)]
    return Dump(pieces=pieces, findings=findings)
