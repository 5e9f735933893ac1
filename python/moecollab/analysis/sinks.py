"""Attention sinks: how much the heads of each layer attend to the first token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moecollab.errors import DataError
from moecollab.models.streamed import decoder_layers
from moecollab.progress import track

FLOOR = 0.05
"""Attention on the first token below which a head has no sink that could decay."""
IS_SINK = 0.3
"""Attention on the first token above which a head counts as one with a sink."""

Mass = dict[int, NDArray[np.float64]]
"""By layer, attention on the first token of each head, (n_heads,)."""


def sink_mass(model: Any, windows: Sequence[Sequence[int]]) -> Mass:  # noqa: ANN401
    """Mean attention of all queries but the first on the first token, for each head.

    The model runs window by window under the "eager" attention, which returns its weights; layers
    without attention (state space, linear) have no entry.

    Parameters
    ----------
    model : causal language model
        Left as it was.
    windows : sequence of sequences of int
        Token ids; those of one token say nothing and are left out.

    Raises
    ------
    DataError
        When no window has two tokens.
    """
    windows = [one for one in windows if len(one) > 1]
    if not windows:
        raise DataError("attention sinks need windows of two tokens or more; give longer text")
    heard = _Heard(model)
    training = model.training
    model.eval()
    try:
        with _eager(model), heard, torch.inference_mode(), track("sinks", len(windows)) as bar:
            for ids in windows:
                tokens = torch.tensor([ids], device=model.device)
                model.base_model(input_ids=tokens, use_cache=False)
                bar.advance(1)
    finally:
        model.train(training)
    return {layer: total / len(windows) for layer, total in sorted(heard.sums.items())}


class _Heard:
    """Adds up attention on the first token while a ``with`` block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = cast(nn.ModuleList, model.get_submodule(decoder_layers(model)))
        self.sums: Mass = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _Heard:
        for number, layer in enumerate(self.layers):
            for module in layer.modules():
                if "attention" in type(module).__name__.lower():
                    self.handles.append(module.register_forward_hook(self._hook(number)))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, number: int) -> Any:  # noqa: ANN401
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
            found = [one for one in output if _is_attention(one)] if _is_some(output) else []
            if found:
                on_first = found[0][0, :, 1:, 0].double().mean(dim=1).cpu().numpy()
                self.sums[number] = self.sums.get(number, 0.0) + on_first

        return hook


def _is_some(output: Any) -> bool:  # noqa: ANN401
    return isinstance(output, tuple | list)


def _is_attention(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[-1] == value.shape[-2]


@contextmanager
def _eager(model: Any) -> Iterator[None]:  # noqa: ANN401
    """A model whose attention returns its weights while the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")


def decay(before: Mass, after: Mass, floor: float = FLOOR) -> pl.DataFrame:
    """How much of the sinks is gone, by layer.

    Returns
    -------
    DataFrame
        layer, heads (with a sink of at least `floor`), sinks (heads above 0.3 before), before and
        after (mean attention of those heads on the first token), decay (1 − mean over heads of
        after / before: equation 7) and decay_of_means (1 − Σ after / Σ before); None for layers
        in which no head has a sink.

    Notes
    -----
    Su et al., arXiv:2507.23279, equation 7, which does not say how queries are averaged. Here the
    first query, which can only attend to itself, is left out, and weights are averaged over the
    others before the ratio is taken; heads without a sink are left out.

    Examples
    --------
    >>> import numpy as np
    >>> decay({0: np.array([0.8, 0.01])}, {0: np.array([0.2, 0.9])})["decay"].round(6).to_list()
    [0.75]
    """
    rows = [(layer, *_decayed(was, after[layer], floor)) for layer, was in before.items()]
    kinds: dict[str, Any] = {"layer": pl.Int64, "heads": pl.Int64, "sinks": pl.Int64}
    kinds |= dict.fromkeys(("before", "after", "decay", "decay_of_means"), pl.Float64)
    return pl.DataFrame(rows, schema=kinds, orient="row")


def _decayed(
    was: NDArray[np.float64], now: NDArray[np.float64], floor: float
) -> tuple[float | None, ...]:
    """Heads, sinks, means before and after, and both decays of one layer."""
    has = was >= floor
    counts = (int(has.sum()), int((was > IS_SINK).sum()))
    if not has.any():
        return *counts, None, None, None, None
    old, new = was[has], now[has]
    means = (float(old.mean()), float(new.mean()))
    return *counts, *means, float(1 - (new / old).mean()), float(1 - new.sum() / old.sum())
