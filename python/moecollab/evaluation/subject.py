"""What is evaluated: a model, its tokenizer and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moecollab.errors import MissingInputError
from moecollab.manifest import digest_json
from moecollab.models.applied import Applied
from moecollab.models.gains import Gains
from moecollab.models.loading import digest_model, load_model, load_tokenizer
from moecollab.models.masked import kept_of


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
        Digest of its weights, cut by a mask if there is one.
    plan : mapping, optional
        Kept experts, if the model is masked.
    """

    model: Any
    tokenizer: Any
    path: str
    digest: str
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
    target = given.model if isinstance(given, Applied) else given
    model, beside = load_model(target, dtype, moe=False)
    path = str(target) if not isinstance(target, nn.Module) else _origin(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(path) if beside is None and _origin(model) else beside
    if tokenizer is None:
        raise MissingInputError(
            f"{path} comes without a tokenizer; pass tokenizer=, or put its files beside the model"
        )
    return Subject(
        model=model,
        tokenizer=tokenizer,
        path=path or type(model).__name__,
        digest=_digest(model, given),
        plan=_plan_of(given),
    )


def _digest(model: Any, given: Any) -> str:  # noqa: ANN401 (as above)
    """Digest of a model's weights, and of the factors on its experts, which are no weights."""
    digest = digest_model(model)
    if isinstance(given, Gains):
        return digest_json([digest, given.as_json()])
    return digest


def _origin(model: Any) -> str:  # noqa: ANN401 (any model)
    """Path or hub name that a loaded model came from, or nothing."""
    return str(getattr(model, "name_or_path", "") or "")


def _plan_of(given: Any) -> dict[str, Any] | None:  # noqa: ANN401 (path, model or what is applied to one)
    """What is applied to a model, or kept experts of a masked model's folder."""
    if isinstance(given, Applied):
        return given.as_json()
    kept = None if isinstance(given, nn.Module) else kept_of(given)
    return None if kept is None else kept.as_json()
