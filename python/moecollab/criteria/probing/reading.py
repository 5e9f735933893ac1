"""Reading what the MoE blocks of a model are given and give on a probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from moecollab.criteria.probing.block import Block
from moecollab.criteria.probing.calls import BlockCall, first_of, listening
from moecollab.criteria.probing.probing import Model, Windows, inputs_of
from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer, text_config
from moecollab.progress import track

HELD = 1 << 30
"""Bytes of blocks' inputs and outputs that are held at once, of one layer at least."""


class _Left(BaseException):
    """Ends a forward after the last block that was wanted."""


def blocks_of(model: Model, layers: Sequence[MoeLayer], windows: Windows) -> Iterator[Block]:
    """The blocks of some layers on all windows, as many layers a pass as :data:`HELD` allows."""
    width = int(text_config(model).hidden_size) * int(model.dtype.itemsize)
    each = 2 * width * sum(len(window) for window in windows)
    size = max(1, HELD // each)
    for start in range(0, len(layers), size):
        for block in record(model, layers[start : start + size], windows, whole=False)[0]:
            yield block.settle()


def record(
    model: Model, layers: Sequence[MoeLayer], windows: Windows, *, whole: bool
) -> tuple[list[Block], Any]:
    """What some blocks were given and gave, and the model's last output if the `whole` runs.

    Raises
    ------
    UnsupportedModelError
        When a block does not run once per window.
    """
    blocks = [Block(layer) for layer in layers]
    output = None
    with torch.inference_mode(), ExitStack() as stack, track("reading blocks", len(windows)) as bar:
        for block in blocks:
            stack.enter_context(_watched(block, leave=not whole and block is blocks[-1]))
        for window in windows:
            with suppress(_Left):
                output = model(**inputs_of(model, window))
            bar.advance()
    for block in blocks:
        if not len(block.given) == len(block.returned) == len(block.chosen) == len(windows):
            raise UnsupportedModelError(
                f"{block.layer.name} ran {len(block.given)} times on {len(windows)} windows, so it "
                "cannot be run again by itself; use a criterion that masks nothing, such as easy_ep"
            )
    return blocks, output


@contextmanager
def _watched(block: Block, *, leave: bool) -> Iterator[None]:
    """Writes down what a block is given and gives."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = BlockCall(args, kwargs)
        block.given.append(call.of(call.hidden.clone()))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        copied = first_of(output).clone()  # models go on to add to it in place
        rest = () if isinstance(output, Tensor) else output[1:]
        block.returned.append(copied if isinstance(output, Tensor) else (copied, *rest))
        if leave:
            raise _Left

    with listening(block.layer) as block.chosen:
        handles = [
            block.layer.block.register_forward_pre_hook(before, with_kwargs=True),
            block.layer.block.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
