"""Tiny random models of five families and a tokenizer for them; no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

N_EXPERTS = 8
TOP_K = 2
VOCABULARY = 260
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_SMALL = {"moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
}
_BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": N_EXPERTS}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        _SMALL | {"num_experts": N_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        _SMALL | {"num_experts": N_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": N_EXPERTS}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        _SMALL | _LATENT | {"n_routed_experts": N_EXPERTS},
    ),
}


def build(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in float32; `changes` go to its configuration."""
    config_class, model_class, own = _BUILDERS[family]
    torch.manual_seed(seed)
    return randomised(model_class(config_class(**(_COMMON | own | changes))), seed)


def build_dense() -> Any:
    """A random dense model."""
    return randomised(LlamaForCausalLM(LlamaConfig(**_COMMON)), 0)


def randomised(model: Any, seed: int) -> Any:
    """The model with weights large enough that routing differs from token to token."""
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("correction_bias"):
                value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
            elif value.dim() >= 2:
                value.copy_(torch.randn(value.shape, generator=draw) * 0.15)
    return model.eval()


def build_tokenizer() -> Any:
    """A tokenizer with one token per byte, after four special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=1_000_000,
    )


def save(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a random model of a family and the tokenizer."""
    build(family, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
