"""Routing in responses of SGLang (``--enable-return-routed-experts``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moecollab.errors import SchemaError
from moecollab.record.imports.dump import Dump, Options, uint32s
from moecollab.record.imports.encoded import Form, decode_ids
from moecollab.record.imports.json_objects import as_count, as_list, as_object, read_objects
from moecollab.record.imports.requests import Request, Tokens, dump_of
from moecollab.record.imports.vllm import domain_of, read_tokens

BARE = ("int32",)


def read_sglang_response(paths: Sequence[Path], options: Options) -> Dump:
    """Responses with base64 of int32 ids for all tokens but the last, and no shape.

    They are under ``meta_info`` of native responses, ``sgl_ext`` of choices in OpenAI's form. The
    layers and experts per token must be said; dense layers are in the file too, with zeros.
    """
    return dump_of(
        request
        for path, where, response in read_objects(paths)
        for request in _requests(path, where, response, options)
    )


def _requests(
    path: Path, where: str, response: dict[str, Any], options: Options
) -> Iterator[Request]:
    if "choices" not in response and "meta_info" not in response:
        raise SchemaError(f"{where} has neither choices nor meta_info; give responses of SGLang")
    if "choices" not in response:
        about = as_object(response["meta_info"], f"{where} meta_info")
        tokens = _native_tokens(response, about, where)
        yield _request(path, where, response, about, tokens, options)
        return
    choices = as_list(response["choices"], f"{where} choices")
    for number, choice in enumerate(choices):
        here = f"{where} choice {number}"
        answer = as_object(choice, here)
        about = as_object(answer.get("sgl_ext") or answer.get("meta_info") or {}, here)
        tokens = read_tokens(response, answer, here, alone=len(choices) == 1)
        yield _request(path, here, response, about, tokens, options, first=number == 0)


def _native_tokens(response: dict[str, Any], about: dict[str, Any], where: str) -> Tokens:
    prompt, written = response.get("prompt_token_ids"), response.get("output_ids")
    n_written = as_count(about.get("completion_tokens"), f"{where} completion_tokens")
    return Tokens(
        n_prompt=as_count(about.get("prompt_tokens"), f"{where} prompt_tokens"),
        n_generated=len(written) if isinstance(written, list) else n_written,
        prompt=None if prompt is None else uint32s(prompt, f"{where} prompt_token_ids"),
        generated=None if written is None else uint32s(written, f"{where} output_ids"),
    )


def _request(
    path: Path,
    where: str,
    response: dict[str, Any],
    about: dict[str, Any],
    tokens: Tokens,
    options: Options,
    *,
    first: bool = True,
) -> Request:
    total = tokens.total
    rows = () if total is None else (total, total - 1)
    return Request(
        where=where,
        file=str(path),
        domain=domain_of(response, options),
        tokens=tokens,
        prompt_rows=None,
        rows=decode_ids(about.get("routed_experts"), where, Form.of(options, BARE, rows)),
        first=first,
    )
