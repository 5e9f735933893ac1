"""What is evaluated: a model, its tokenizer and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moecollab.embedded import located
from moecollab.errors import MissingInputError
from moecollab.evaluation.perplexity import encode
from moecollab.manifest import digest_json
from moecollab.models.applied import Applied, applied_to
from moecollab.models.loading import (
    digest_base,
    digest_parts,
    digest_tensors,
    load_model,
    load_tokenizer,
)
from moecollab.models.masked import kept_of
from moecollab.record.corpus import Corpus

PROBED, PROBED_LETTERS = 8, 1000
"""Documents of which a tokenizer's digest reads the beginning, and letters of each."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is ready to be measured.

    Parameters
    ----------
    model, tokenizer : causal language model and its tokenizer
        Loaded.
    path : str
        Where the model came from, or its class if it came from nowhere.
    digest : str
        Digest of its weights and of all that is on it: masks, gains and modes.
    base : str
        Digest of the weights that no mask changes.
    plan : mapping, optional
        Kept experts, if the model is masked.
    """

    model: Any
    tokenizer: Any
    path: str
    digest: str
    base: str
    plan: Mapping[str, Any] | None

    @property
    def folder(self) -> Path | None:
        """Folder that the weights come from, of a masked model those of the full one."""
        folder = Path(_origin(self.model) or self.path)
        return folder if folder.is_dir() else None

    @property
    def name(self) -> str:
        """Last part of the path."""
        return Path(self.path).name or self.path


def open_subject(
    given: Any,  # noqa: ANN401 (path, model or what is applied to one)
    tokenizer: Any = None,  # noqa: ANN401
    dtype: str = "auto",
) -> Subject:
    """Loads a model, or takes a loaded or masked one as it is.

    Raises
    ------
    MissingInputError
        When no tokenizer is given and none lies beside the model.
    """
    given = located(given)
    target = given.model if isinstance(given, Applied) else given
    model, beside = load_model(target, dtype, moe=False)
    path = str(target) if not isinstance(target, nn.Module) else _origin(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(path) if beside is None and _origin(model) else beside
    if tokenizer is None:
        raise MissingInputError(
            f"{path} comes without a tokenizer; pass tokenizer=, or put its files beside the model"
        )
    tensors = digest_tensors(model)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        path=path or type(model).__name__,
        digest=_digest(model, tensors),
        base=digest_base(model, tensors),
        plan=_plan_of(given, model),
    )


def digest_tokenizer(tokenizer: Any, corpus: Corpus | None) -> str:  # noqa: ANN401 (any tokenizer)
    """Digest of a tokenizer's class, tokens and special tokens, and of how some text begins.

    Text is read because merges and normalisation may differ where vocabularies do not; as it is
    what will be measured, every tokenizer can read it.
    """
    documents = () if corpus is None else corpus.documents[:PROBED]
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    special = getattr(tokenizer, "special_tokens_map", {})
    read = [encode(tokenizer, document.text[:PROBED_LETTERS]) for document in documents]
    plain = {str(name): str(token) for name, token in special.items()}
    return digest_json([type(tokenizer).__name__, vocabulary, plain, read])


def _digest(model: Any, tensors: dict[str, str]) -> str:  # noqa: ANN401 (as above)
    """Digest of a model's weights, and of what is on it, much of which is no weights."""
    digest, applied = digest_parts(model, tensors), applied_to(model)
    return digest_json([digest, applied]) if applied else digest


def _origin(model: Any) -> str:  # noqa: ANN401 (any model)
    """Path or hub name that a loaded model came from, or nothing."""
    return str(getattr(model, "name_or_path", "") or "")


def _plan_of(given: Any, model: Any) -> dict[str, Any] | None:  # noqa: ANN401 (as above)
    """What is on a model now, however it was given, or what a cut model's folder keeps."""
    applied = applied_to(model)
    if applied:
        return applied[0] if len(applied) == 1 else {"applied": applied}
    kept = None if isinstance(given, nn.Module | Applied) else kept_of(given)
    return None if kept is None else kept.as_json()
