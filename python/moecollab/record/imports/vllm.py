"""Routing in responses of vLLM (``--enable-return-routed-experts``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moecollab.errors import SchemaError
from moecollab.record.corpus import DEFAULT_DOMAIN
from moecollab.record.imports.dump import Dump, Options, uint32s
from moecollab.record.imports.encoded import Form, decode_ids
from moecollab.record.imports.json_objects import as_count, as_list, as_object, read_objects
from moecollab.record.imports.requests import Request, Tokens, dump_of

BARE = ("uint8", "uint16", "int32")


def read_vllm(paths: Sequence[Path], options: Options) -> Dump:
    """Responses with ``routed_experts`` in their choices, as JSON or a response a line.

    Older servers give nested lists, the prompt's apart as ``prompt_routed_experts``; newer ones
    base64 of a ``.npy`` file for all tokens but the last. No version gives weights.
    """
    return dump_of(
        request
        for path, where, response in read_objects(paths)
        for request in _requests(path, where, response, options)
    )


def _requests(
    path: Path, where: str, response: dict[str, Any], options: Options
) -> Iterator[Request]:
    if "choices" not in response:
        raise SchemaError(f"{where} has no choices; give responses of a vLLM server")
    choices = as_list(response["choices"], f"{where} choices")
    for number, choice in enumerate(choices):
        here = f"{where} choice {number}"
        answer = as_object(choice, here)
        tokens = read_tokens(response, answer, here, alone=len(choices) == 1)
        value, start = answer.get("routed_experts"), 0
        if isinstance(value, dict):
            start = as_count(value.get("start"), f"{here} start") or 0
        prompt = response.get("prompt_routed_experts", answer.get("prompt_routed_experts"))
        n_prompt = tokens.n_prompt
        of_prompt = Form.of(options, BARE, () if n_prompt is None else (n_prompt, n_prompt - 1))
        yield Request(
            where=here,
            file=str(path),
            domain=domain_of(response, options),
            tokens=tokens,
            prompt_rows=decode_ids(prompt, f"{here} prompt", of_prompt),
            rows=decode_ids(value, here, Form.of(options, BARE, tokens.allowed(start))),
            start=start,
            first=number == 0,
        )


def domain_of(response: dict[str, Any], options: Options) -> str:
    """Domain of a response; one may be written into it."""
    named = response.get("domain")
    return options.domain or (named if isinstance(named, str) and named else DEFAULT_DOMAIN)


def read_tokens(
    response: dict[str, Any], answer: dict[str, Any], where: str, *, alone: bool
) -> Tokens:
    """What a response in OpenAI's form says about its tokens."""
    usage = as_object(response.get("usage") or {}, f"{where} usage")
    prompt = response.get("prompt_token_ids") or answer.get("prompt_token_ids")
    generated = answer.get("token_ids")
    of_prompt = None if prompt is None else uint32s(prompt, f"{where} prompt_token_ids")
    written = None if generated is None else uint32s(generated, f"{where} token_ids")
    n_prompt = as_count(usage.get("prompt_tokens"), f"{where} prompt_tokens")
    n_written = as_count(usage.get("completion_tokens"), f"{where} completion_tokens")
    return Tokens(
        n_prompt=n_prompt if of_prompt is None else len(of_prompt),
        n_generated=len(written) if written is not None else (n_written if alone else None),
        prompt=of_prompt,
        generated=written,
    )
