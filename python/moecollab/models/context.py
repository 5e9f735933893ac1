"""How much text a model reads at once."""

from __future__ import annotations

from typing import Any

from moecollab.progress import say


def context_of(config: Any, asked: int) -> int:  # noqa: ANN401 (transformers is untyped)
    """Tokens read at once: as asked, or as many places as the model has, which is said.

    Parameters
    ----------
    config : object
        Configuration of the model's text part.
    asked : int
        Tokens, ≥ 1.
    """
    places = int(getattr(config, "max_position_embeddings", None) or asked)
    if places < asked:
        say(f"read in pieces of {places} tokens, not {asked}: the model has no more places")
    return min(asked, places)
