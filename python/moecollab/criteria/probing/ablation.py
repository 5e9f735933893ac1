"""What the model loses when one expert goes: every expert of every layer, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moecollab.criteria.base import Evidence
from moecollab.criteria.probing.block import Block, without
from moecollab.criteria.probing.calls import first_of
from moecollab.criteria.probing.probing import (
    FOREIGN,
    Model,
    check_masks,
    finite,
    hidden,
    inputs_of,
    logits_in,
    losses_of,
    subject,
)
from moecollab.criteria.probing.reading import record
from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.replay import instead
from moecollab.models.routing import MoeLayer
from moecollab.models.streamed import decoder_layers
from moecollab.progress import track

LOGITS = 1 << 26
"""Most logits that are computed at once, but for one window's."""

TOKENS = 4096
"""Most tokens of copies of a window that run at once."""

_CLOSE = {4: 1e-5, 8: 1e-5}  # how far rounding may move a loss, by bytes of a number
_CLOSE_HALF = 1e-2


def loss_differences(evidence: Evidence) -> NDArray[np.float64]:
    """Nats per predicted token that each expert's loss adds: (n_layers, n_experts)."""
    model, layers, windows = subject(evidence)
    check_masks(layers, [1] * len(layers))
    numbered = [(number, one) for number, one in enumerate(windows) if len(one) > 1]
    if not numbered:
        raise DataError("no window of the text has two tokens, so nothing is predicted; give more")
    numbered.sort(key=lambda one: -len(one[1]))  # the longest tells best what can be left out
    found = np.zeros(evidence.shape)
    checked: dict[int, Block] = {}
    resumes: dict[int, bool] = {}
    with torch.inference_mode(), track("removing experts", len(numbered) * len(layers)) as bar:
        for number, window in numbered:
            whole = _Window(model, layers, window, f"window {number} of the text")
            for row, block in enumerate(whole.blocks):
                block.settle(checked.get(row))
                if row not in checked:
                    checked[row], resumes[row] = block, whole.resumes(block)
                found[row, : block.layer.n_experts] += whole.differences(block, resume=resumes[row])
                bar.advance()
    return found / sum(len(window) - 1 for _, window in numbered)


class _Window:
    """One window that ran through the whole model, and runs again from any of its layers.

    Parameters
    ----------
    model : causal language model
        The model.
    layers : list of MoeLayer
        Its MoE layers.
    window : int64 array of shape (n_tokens,)
        Token ids.
    where : str
        What the window is called in messages.
    """

    def __init__(
        self, model: Model, layers: Sequence[MoeLayer], window: NDArray[np.int64], where: str
    ) -> None:
        self.model, self.window, self.where = model, window, where
        self.decoder = _decoder(model)
        with _outputs(self.decoder) as self.between:
            self.blocks, output = record(model, layers, [window], whole=True)
        logits = logits_in(model, output)
        self.loss = float(finite(losses_of(logits, window), where)[0])
        logits_per_row = max(1, logits[0].numel())
        self.copies = max(1, min(LOGITS // logits_per_row, TOKENS // len(window)))

    def resumes(self, block: Block) -> bool:
        """Whether the layers from the block on, given what it made, come to the same loss."""
        if not self.decoder:
            return False
        same = block.output[None].repeat(2, 1, 1)
        try:
            losses = self._resumed(block, same)
        except FOREIGN:  # layers that want more than what the ones before gave
            return False
        close = _CLOSE.get(block.output.dtype.itemsize, _CLOSE_HALF)
        return bool(((losses - self.loss).abs() <= close * abs(self.loss)).all())

    def differences(self, block: Block, *, resume: bool) -> NDArray[np.float64]:
        """Nats that each of the block's experts adds when it goes; 0 if no token is concerned."""
        found = np.zeros(block.layer.n_experts)
        tokens = [block.concerned((expert,)) for expert in range(block.layer.n_experts)]
        missed = [expert for expert, own in enumerate(tokens) if len(own)]
        size = self.copies if resume else 1
        for start in range(0, len(missed), size):
            experts = missed[start : start + size]
            if resume:
                outputs = torch.stack([self._output(block, one, tokens[one]) for one in experts])
                losses = self._resumed(block, outputs)
            else:
                losses = self._masked(block, experts[0])
            finite(losses, f"{self.where}, without an expert of layer {block.layer.layer},")
            found[experts] = losses.cpu().numpy() - self.loss
        return found

    def _output(self, block: Block, expert: int, tokens: Tensor) -> Tensor:
        """What the block makes of the window without an expert: (n_tokens, hidden)."""
        output = block.output.clone()
        output[tokens] = block.run(without(block.layer, (expert,)), tokens)[0]
        return output

    def _masked(self, block: Block, expert: int) -> Tensor:
        """Loss of the whole model without an expert: (1,)."""
        with hidden(block.layer, without(block.layer, (expert,))):
            output = self.model(**inputs_of(self.model, self.window))
        return losses_of(logits_in(self.model, output), self.window)

    def _resumed(self, block: Block, outputs: Tensor) -> Tensor:
        """Losses with other outputs of the block: (n_copies, n_tokens, hidden) to (n_copies,)."""
        with ExitStack() as stack:
            for place in range(block.layer.layer):
                given = _copies(self.between[place], len(outputs))
                stack.enter_context(instead(self.decoder[place], given))
            given = _as_returned(block.returned[0], outputs)
            stack.enter_context(instead(block.layer.block, given))
            output = self.model(**inputs_of(self.model, self.window, len(outputs)))
        return losses_of(logits_in(self.model, output), self.window)


def _decoder(model: Model) -> list[nn.Module]:
    """The decoder layers, none if they are no list."""
    try:
        return list(model.get_submodule(decoder_layers(model)))
    except UnsupportedModelError:
        return []


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What some modules return, one after the other; copies."""
    found: list[Any] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
        found.append(tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, output))

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _copies(output: Any, n_copies: int) -> Callable[..., Any]:  # noqa: ANN401
    """A forward that returns what a layer gave for one row, for several."""

    def one(value: Any) -> Any:  # noqa: ANN401
        single = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1
        return value.repeat(n_copies, *[1] * (value.dim() - 1)) if single else value

    return lambda *_args, **_kwargs: tree_map(one, output)


def _as_returned(returned: Any, outputs: Tensor) -> Callable[..., Any]:  # noqa: ANN401
    """A forward that returns other outputs in the way in which a block returns its own."""
    shape = first_of(returned).shape
    joined = outputs.reshape(-1, *shape[1:])
    given = joined if isinstance(returned, Tensor) else (joined, *returned[1:])
    return lambda *_args, **_kwargs: given
