"""What a model writes when it goes on with a text, always taking the likeliest token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from transformers import GenerationConfig

from moecollab.errors import DataError, SettingsError
from moecollab.evaluation.perplexity import encode
from moecollab.evaluation.repetition import ends_in_loop, longest_loop, repeated
from moecollab.progress import track

if TYPE_CHECKING:
    from moecollab.record.corpus import Corpus

OPENING = 32
"""Tokens of a held-out document that are gone on with."""
MOST_PROMPTS = 32
"""Prompts that are taken if no limit is given."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SCHEMA: dict[str, Any] = {
    "prompt": pl.String,
    "domain": pl.String,
    "text": pl.String,
    "written": pl.String,
    "ids": pl.List(pl.Int64),
}


@dataclass(frozen=True)
class Prompts:
    """Beginnings to go on with, in the model's own tokens.

    Parameters
    ----------
    corpus : Corpus
        Where they come from.
    rows : tuple of int
        Which documents.
    ids : tuple of tuple of int
        Their tokens, at least one each.
    """

    corpus: Corpus
    rows: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def read(
        cls,
        tokenizer: Any,  # noqa: ANN401 (any tokenizer)
        corpus: Corpus,
        *,
        limit: int | None = None,
        opening: int | None = None,
        room: int | None = None,
    ) -> Prompts:
        """Prompts from documents that are spread evenly over a corpus.

        Parameters
        ----------
        tokenizer : tokenizer
            The model's own; an end-of-text token that it appends is taken off.
        corpus : Corpus
            Documents with domains.
        limit : int, optional
            Prompts at most; 32 if not given.
        opening : int, optional
            First tokens of each document that are taken; all if not given.
        room : int, optional
            Tokens that fit the model before what it writes; a longer prompt loses its first ones.

        Raises
        ------
        DataError
            When no document has a token.
        """
        n, most = len(corpus), min(len(corpus), limit or MOST_PROMPTS)
        rows, ids = [], []
        for row in (number * n // most for number in range(most)):
            found = encode(tokenizer, corpus.documents[row].text)
            if len(found) > 1 and found[-1] == getattr(tokenizer, "eos_token_id", None):
                found.pop()
            kept = found[:opening][-room if room else None :]
            if kept:
                rows.append(row)
                ids.append(tuple(kept))
        if not ids:
            raise DataError("no prompt has a token; give longer text")
        return cls(corpus, tuple(rows), tuple(ids))


def continuations(
    model: Any,  # noqa: ANN401 (any causal language model)
    tokenizer: Any,  # noqa: ANN401 (any tokenizer)
    prompts: Prompts,
    *,
    tokens: int,
    batch_size: int,
) -> pl.DataFrame:
    """What the model writes after each prompt, the likeliest token each time.

    Prompts of equally many tokens are run together, so that nothing is padded. Penalties and
    sampling that the model's generation settings ask for are left out: they would hide repetition.

    Parameters
    ----------
    model, tokenizer : causal language model and its tokenizer
        Left as they were.
    prompts : Prompts
        What to go on with.
    tokens : int
        Tokens to write, at least 1; fewer where the model ends the text.
    batch_size : int
        Prompts at once, at least 1.

    Returns
    -------
    DataFrame
        Columns prompt (the document), domain, text (of the prompt), written (text) and ids (tokens
        written, without the end of text), in the order of the prompts.

    Raises
    ------
    DataError
        When the model cannot generate.
    """
    if not hasattr(model, "generate"):
        raise DataError(f"{type(model).__name__} has no generate method; leave generate out")
    written: dict[int, list[int]] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), track("writing on", len(prompts.ids)) as bar:
            for batch in _batches(prompts.ids, batch_size):
                found = _greedy(model, [prompts.ids[row] for row in batch], tokens)
                written.update(zip(batch, found, strict=True))
                bar.advance(len(batch))
    finally:
        model.train(training)
    return _table(tokenizer, prompts, [written[row] for row in range(len(prompts.ids))])


def repetition(generations: pl.DataFrame) -> pl.DataFrame:
    """How much each continuation repeats itself.

    Returns
    -------
    DataFrame
        Columns prompt, domain, tokens, rep_2 and rep_4 (share of repeated n-grams), loop (share of
        its tokens in its longest loop) and stuck (1 if it ends in a loop, or else 0).
    """
    texts = generations["ids"].to_list()
    columns = {
        "tokens": [len(ids) for ids in texts],
        "rep_2": [repeated(ids, 2) for ids in texts],
        "rep_4": [repeated(ids, 4) for ids in texts],
        "loop": [longest_loop(ids) / max(1, len(ids)) for ids in texts],
        "stuck": [float(ends_in_loop(ids)) for ids in texts],
    }
    kinds = [pl.Int64, *[pl.Float64] * 4]
    found = pl.DataFrame(columns, schema=dict(zip(columns, kinds, strict=True)))
    return generations.select("prompt", "domain").hstack(found)


def check_tokens(ids: Sequence[int], model: Any) -> None:  # noqa: ANN401 (any causal model)
    """Raises DataError when a token has no row in the model's embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= rows:
        raise DataError(
            f"the tokenizer gives token {max(ids)} but the model has embeddings of {rows} tokens "
            "only; use the tokenizer that the model was trained with"
        )


def check_room(tokens: int, window: int) -> None:
    """Raises SettingsError when what is written leaves no place for a prompt."""
    if tokens >= window:
        raise SettingsError(
            "generate", tokens, f"at most {window - 1}: model and context hold {window} tokens"
        )


def greedy_settings(model: Any, tokens: int, *, ends: bool = True) -> GenerationConfig:  # noqa: ANN401
    """Plain greedy generation with the model's own end of text, or on past it."""
    own = getattr(model, "generation_config", None)
    config = getattr(model.config, "text_config", None) or model.config
    end = getattr(own, "eos_token_id", None)
    end = getattr(config, "eos_token_id", None) if end is None else end
    pad = end[0] if isinstance(end, list | tuple) else end
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        min_new_tokens=None if ends else tokens,
        eos_token_id=end,
        pad_token_id=pad or 0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
    )


@contextmanager
def only_greedy(model: Any, tokens: int, *, ends: bool = True) -> Iterator[GenerationConfig]:  # noqa: ANN401
    """Greedy settings for `generate`, which fills what they leave open from blank ones meanwhile.

    A checkpoint may suppress tokens, guide, stop or force; none of it would be seen in the text.
    """
    settings, own = greedy_settings(model, tokens, ends=ends), vars(model).get("generation_config")
    if own is None:
        yield settings
        return
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in _IDS})
    try:
        yield settings
    finally:
        model.generation_config = own


def _batches(prompts: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[int]]:
    """Rows of prompts of equally many tokens, the longest first."""
    lengths: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        lengths.setdefault(len(ids), []).append(row)
    for length in sorted(lengths, reverse=True):
        rows = lengths[length]
        yield from (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))


def _greedy(model: Any, batch: list[tuple[int, ...]], tokens: int) -> list[list[int]]:  # noqa: ANN401
    """Tokens written after each of some prompts of one length, up to the end of the text."""
    for ids in batch:
        check_tokens(ids, model)
    given = torch.tensor(batch, device=model.device)
    with only_greedy(model, tokens) as settings:
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings
        )
    end = settings.eos_token_id
    ends = set(end) if isinstance(end, list | tuple) else {end}
    return [_up_to(row, ends) for row in found[:, given.shape[1] :].tolist()]


def _up_to(ids: list[int], ends: set[int | None]) -> list[int]:
    """Tokens before the first that ends the text."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _table(tokenizer: Any, prompts: Prompts, written: list[list[int]]) -> pl.DataFrame:  # noqa: ANN401
    """The table of continuations."""
    documents = [prompts.corpus.documents[row] for row in prompts.rows]
    columns = {
        "prompt": [document.id for document in documents],
        "domain": [document.domain for document in documents],
        "text": [_words(tokenizer, ids) for ids in prompts.ids],
        "written": [_words(tokenizer, ids) for ids in written],
        "ids": written,
    }
    return pl.DataFrame(columns, schema=SCHEMA)


def _words(tokenizer: Any, ids: Sequence[int]) -> str:  # noqa: ANN401 (any tokenizer)
    """Text of some tokens; those of a padded vocabulary that stand for nothing are left out."""
    known = len(tokenizer)
    return str(tokenizer.decode([token for token in ids if token < known]))
