"""The residual stream in front of a layer's experts, and how far they turn it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecollab.errors import UnsupportedModelError
from moecollab.models.routing import MoeLayer


class Residual:
    """Finds what a layer's last norm read before the experts: the stream they add to.

    A norm whose output, the very memory, is what the block or the experts are given has read the
    stream; in a layer without norms the block is given the stream itself.

    Parameters
    ----------
    model : Module
        The model that holds the layer.
    layer : MoeLayer
        The layer to watch.

    Raises
    ------
    UnsupportedModelError
        When what the experts of this family sum up to is not added to the stream as it is.
    """

    def __init__(self, model: nn.Module, layer: MoeLayer) -> None:
        if layer.layout.shift:
            raise UnsupportedModelError(
                f"the shift of the residual stream cannot be recorded of {layer.layout.family}: "
                f'{layer.layout.shift}; record without collect="shift"'
            )
        self.layer = layer
        self.decoder = model.get_submodule(_numbered(layer.name))
        self.normed: list[tuple[Tensor, Tensor]] = []
        self.stream: Tensor | None = None
        self.given: Tensor | None = None

    def attach(self) -> Sequence[RemovableHandle]:
        """Hooks on the norms of the decoder layer, on the block and on the experts."""
        norms = [one for one in self.decoder.modules() if "norm" in type(one).__name__.lower()]
        handles = [norm.register_forward_hook(self._after_norm) for norm in norms]
        if self.layer.block is not self.decoder:
            hook = self.layer.block.register_forward_pre_hook(self._before_block, with_kwargs=True)
            handles.append(hook)
        before = self.layer.experts.register_forward_pre_hook(
            self._before_experts, with_kwargs=True, prepend=True
        )
        return [*handles, before]

    def turned(self, routed: Tensor) -> Tensor:
        """1 − cosine between the stream and the stream with the experts' sum, at least 0.

        Parameters
        ----------
        routed : Tensor of shape (n_positions, hidden)
            Weighted sum of the routed experts.

        Returns
        -------
        float32 Tensor of shape (n_positions,)
            EASY-EP's token term (arXiv:2504.06792).
        """
        stream = self.stream if self.normed else self.given
        self.stream, self.given, self.normed = None, None, []
        if stream is None or stream.shape != routed.shape:
            raise UnsupportedModelError(
                f"no residual stream was found to which layer {self.layer.layer} adds its experts; "
                'record without collect="shift"'
            )
        before, after = stream.float(), stream.float() + self.layer.scale * routed.float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        return (1 - cosine).clamp_min(0)

    def _after_norm(self, _norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        if isinstance(output, Tensor) and args:
            self.normed.append((output.detach(), args[0].detach()))

    def _before_block(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._look_at(_hidden(args, kwargs))

    def _before_experts(
        self, _experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._look_at(_hidden(args, kwargs))

    def _look_at(self, hidden: Tensor) -> None:
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        self.given = flat if self.given is None else self.given
        for output, stream in self.normed:
            if output.data_ptr() == hidden.data_ptr() and output.numel() == hidden.numel():
                self.stream = stream.reshape(-1, stream.shape[-1])


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was called with first: hidden states."""
    tensors: list[Tensor] = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    return tensors[0]


def _numbered(name: str) -> str:
    """The path up to its last number: the decoder layer of a block."""
    parts = name.split(".")
    last = max(at for at, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])
