"""A stock Qwen2-MoE carved from a dense Llama, layer by layer.

Each layer is carved on the hidden states of the layers carved before it.
"""

from __future__ import annotations

from typing import Any

import torch
from carving import Carved, Ffn, Seen, Shape, carve_layer, output_error
from torch import Tensor

from moecollab.errors import SettingsError
from moecollab.progress import say, track

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)  # settings that both kinds of model have
_TOKENS = 2_048  # tokens that go through a block at once


def write_block(block: Any, ffn: Ffn, carved: Carved, shape: Shape) -> None:
    """Fills a stock Qwen2-MoE block with the carved layer."""
    first, rest = carved.order[: shape.shared], carved.order[shape.shared :]
    routed = rest.view(shape.experts, shape.width)
    down = carved.down[:, shape.shared :].view(-1, shape.experts, shape.width)
    parts = {
        "gate.weight": carved.router,
        "shared_expert_gate.weight": torch.zeros(1, ffn.down.shape[0]),
        "shared_expert.gate_proj.weight": ffn.gate[first],
        "shared_expert.up_proj.weight": ffn.up[first],
        "shared_expert.down_proj.weight": carved.down[:, : shape.shared],
        "experts.gate_up_proj": torch.cat([ffn.gate[routed], ffn.up[routed]], dim=1),
        "experts.down_proj": down.transpose(0, 1),
    }
    block.load_state_dict(parts)


def dense_ffn(mlp: Any) -> Ffn:
    """The weights of a Llama feed-forward layer in float32."""
    return Ffn(
        *(
            getattr(mlp, name).weight.detach().float()
            for name in ("gate_proj", "up_proj", "down_proj")
        )
    )


def empty_copy(dense: Any, shape: Shape) -> Any:
    """A stock Qwen2-MoE of the dense Llama's sizes, everything but its experts copied."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    old = dense.config
    if shape.neurons != old.intermediate_size:
        raise SettingsError(
            "shape", shape.neurons, f"{old.intermediate_size} neurons, as the dense layer has"
        )
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in _SAME},
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared,
        mlp_only_layers=list(range(shape.dense_layers)),
        norm_topk_prob=True,
        qkv_bias=False,
        router_aux_loss_coef=0.0,
    )
    model = Qwen2MoeForCausalLM(config).float().eval()
    missing, _ = model.load_state_dict(dense.state_dict(), strict=False)
    strange = [name for name in missing if ".mlp." not in name]
    if strange:
        raise SettingsError("dense", strange[0], "a Llama without biases")
    return model


@torch.no_grad()
def carve_model(dense: Any, ids: Tensor, shape: Shape, seed: int) -> tuple[Any, dict[int, float]]:
    """A stock Qwen2-MoE carved from a dense Llama, and each layer's error on the given windows.

    Parameters
    ----------
    dense : LlamaForCausalLM
        In float32; is not changed.
    ids : Tensor
        Token ids of the calibration windows, (n_windows, length).
    """
    model, errors = empty_copy(dense, shape), {}
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with track("carve", total=len(model.model.layers)) as bar:
        for number, layer in enumerate(model.model.layers):
            hidden = _after_attention(layer, hidden, rotary)
            x = layer.post_attention_layernorm(hidden).flatten(0, 1)
            if number >= shape.dense_layers:
                ffn = dense_ffn(dense.model.layers[number].mlp)
                seen = Seen.of(ffn, x, hidden.flatten(0, 1))
                carved = carve_layer(ffn, seen, shape, seed)
                write_block(layer.mlp, ffn, carved, shape)
                errors[number] = output_error(seen, carved, shape)
            parts = [layer.mlp(part[None])[0] for part in x.split(_TOKENS)]
            hidden = hidden + torch.cat(parts).view_as(hidden)
            bar.advance()
            say(f"layer {number}: relative error {errors.get(number, 0.0):.4f}")
    return model, errors


def _after_attention(layer: Any, hidden: Tensor, rotary: Any) -> Tensor:
    """The residual stream after a layer's attention, a few windows at a time."""
    rows = []
    for part in hidden.split(8):
        found, _ = layer.self_attn(layer.input_layernorm(part), position_embeddings=rotary)
        rows.append(part + found)
    return torch.cat(rows)
