"""Tiny random models of families whose forwards differ, for tests of running them in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import models

_EXPERTS = models.N_EXPERTS
_HYBRID = ["linear_attention", "moe", "full_attention", "moe"]
_LATENT = {"num_key_value_heads": 4, "n_routed_experts": _EXPERTS}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# What sets each apart: latent attention and complex rotations, sinks and fused experts, hash layers
# and several streams, state space layers, per-layer inputs, router states handed on.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", _LATENT | {"topk_method": "greedy"}),
    "deepseek_v4": (
        "DeepseekV4",
        {"n_routed_experts": _EXPERTS, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    ),
    "gemma4": (
        "Gemma4",
        {
            "num_experts": _EXPERTS,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": models.VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "glm4_moe": ("Glm4Moe", {"n_routed_experts": _EXPERTS}),
    "gpt_oss": ("GptOss", {"num_local_experts": _EXPERTS}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": _EXPERTS}),
    "jamba": (
        "Jamba",
        {
            "num_experts": _EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "num_experts": _EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "minimax": ("MiniMax", {"num_local_experts": _EXPERTS}),
    "nemotron_h": (
        "NemotronH",
        {
            "n_routed_experts": _EXPERTS,
            "layers_block_type": _HYBRID,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "phimoe": ("Phimoe", {"num_local_experts": _EXPERTS}),
    "qwen3_next": ("Qwen3Next", _LINEAR | {"num_experts": _EXPERTS}),
    "zaya": ("Zaya", {"num_experts": _EXPERTS, "num_experts_per_tok": 1}),
}
_SIZES = models._COMMON | {
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}


def save(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a random model of a family and the tokenizer."""
    if family in models.FAMILIES:
        return models.save(family, folder, **changes)
    name, own = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config", None) or getattr(
        transformers, f"{name}TextConfig"
    )
    if name == "Gemma4":
        config_class = transformers.Gemma4TextConfig
    known = set(vars(config_class())) | set(config_class.attribute_map)
    alias = config_class.attribute_map
    sizes = {alias.get(key, key): value for key, value in _SIZES.items() if key in known}
    torch.manual_seed(0)
    changed = {alias.get(key, key): value for key, value in (own | changes).items()}
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(sizes | changed)))
    for key, value in model.named_buffers():
        if key.endswith("tid2eid"):
            draw = torch.Generator().manual_seed(1)
            value.copy_(
                torch.stack(
                    [torch.randperm(_EXPERTS, generator=draw)[: value.shape[1]] for _ in value]
                )
            )
    models.randomised(model, 0).save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    return folder
