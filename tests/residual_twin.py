"""What a decoder layer truly adds for its experts: the layer run again without them."""

from __future__ import annotations

import torch


def first(output):
    """The hidden states of what a module returned."""
    return output[0] if isinstance(output, tuple | list) else output


def zeroed(_module, _args, output):
    """A hook that makes a module return zeros."""
    if isinstance(output, tuple | list):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def without(module, decoder, call):
    """Output of a decoder layer while one of its modules returns zeros."""
    handle = module.register_forward_hook(zeroed)
    try:
        return first(decoder.forward(*call[0], **call[1])).clone()
    finally:
        handle.remove()


def seen_calls(model, decoders, inputs):
    """Arguments and output of each decoder layer in one forward pass."""
    calls = {}

    def keep(number):
        def hook(_module, args, kwargs, output):
            calls[number] = ((args, kwargs), first(output).clone())

        return hook

    handles = [
        decoder.register_forward_hook(keep(number), with_kwargs=True)
        for number, decoder in enumerate(decoders)
    ]
    with torch.inference_mode():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return [calls[number] for number in range(len(decoders))]
