"""A tiny random model of every Mixture-of-Experts family of transformers; no download.

Rows say only what differs from `_COMMON`, of which each configuration takes the fields it has.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_EXPERTS = 8
VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

_LATENT = {"num_key_value_heads": 4}
_GROUPS = {"n_group": 2, "topk_group": 1}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_AXES = {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}
_NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 4,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {
        "ffn_hidden_size": 16,
        "moe_num_experts": N_EXPERTS,
        "moe_top_k": 2,
        "hidden_size": 32,
        "ffn_act_fn": {"name": "silu"},
    },
}

ZOO: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen4_exp_text": _DELTA | _INDEXER,
    "olmoe": {},
    "flex_olmo": {},
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "deepseek_v2/groups": _LATENT
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2},
    "deepseek_v32": _LATENT | _GROUPS,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "phimoe": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "granitemoe_swa": {"shared_intermediate_size": 16},
    "granitemoehybrid": {
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    }
    | _MAMBA,
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "glm4v_moe_text": {
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    },
    "glm5_next_text": _LATENT | {"qk_rope_head_dim": 0},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
    },
    "llama4_text/top-2": {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    "ernie4_5_moe": {
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_layer_interval": 1,
    },
    "ernie4_5_vl_moe_text": {
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [16, 8],
    }
    | _THREE_AXES,
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": {},
    "hy_v4": {},
    "dbrx": _DBRX,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"kv_channels": 8},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "dots1": {},
    "dots3_note_text": _LATENT | {"mlp_layer_types": None},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": _NEMOTRON,
    "nemotron_h/latent": _NEMOTRON | {"moe_latent_size": 12},
    "longcat_flash": _LATENT
    | {
        "zero_expert_num": 4,
        "moe_topk": 3,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
        "num_layers": 2,
    },
    "longcat_flash/no-identity": _LATENT
    | {
        "zero_expert_num": 0,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
        "num_layers": 2,
    },
    "kimi_linear": _LATENT | _MIXED | {"num_experts_per_token": 2},
    "bailing_hybrid": _LATENT
    | _MIXED
    | {"num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1},
    "solar_open": {},
    "afmoe": {"num_dense_layers": 1, "route_scale": 1.7},
    "exaone_moe": {},
    "aria_text": {"moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _LATENT | _GROUPS,
    "axk2": _LATENT,
    "beam": _GROUPS,
    "cohere2_moe": {},
    "cohere2_moe/averaged": {
        "expert_selection_fn": "sigmoid",
        "shared_expert_combination_strategy": "average",
    },
    "flint": {},
    "gemma4_text": {
        "top_k_experts": 2,
        "enable_moe_block": True,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "inkling_text": {"n_shared_experts": 2},
    "inkling2_text": {},
    "kolibri1": {},
    "laguna": {"moe_routed_scaling_factor": 1.7},
    "mellum": {},
    "mimo_v2_flash": {},
    "mistral4": _LATENT
    | _GROUPS
    | {
        "head_dim": None,
        "rope_parameters": _ROPE
        | {
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral_large4_text": _LATENT,
    "muse_spark_text": {"moe_hidden_size": 16},
    "step3p5": {"sliding_window": 8, "moe_router_scaling_factor": 1.7},
    "zaya": {"num_experts_per_tok": 1},
    "qwen3_vl_moe_text": {},
    "qwen3_omni_moe_text": {},
    "deepseek_ocr2_text": {},
    "unlimited_ocr_text": {},
    "openai_privacy_filter": {},
}
"""Settings by ``model_type``, after a slash the variant."""

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MODELS = {
    "ernie4_5_vl_moe_text": "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeTextModel",
    "step3p5": "step3p7.modeling_step3p7.Step3p7TextModel",
    "qwen3_omni_moe_text": "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeThinkerTextModel",
    "deepseek_ocr2_text": "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2TextModel",
    "unlimited_ocr_text": "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrTextModel",
}
"""Classes that no automatic class of transformers finds."""

_SINCE = {"aria_text": "5.18", "dbrx": "5.18"}
"""Aria's experts were called with logits before; DBRX does not run at all in 5.13."""


def missing(name: str) -> str:
    """Why the installed transformers cannot build a family; empty if it can."""
    model_type = name.partition("/")[0]
    if model_type not in CONFIG_MAPPING:
        return f"this transformers has no {model_type}"
    since = _SINCE.get(model_type, "0")
    old = Version(transformers.__version__) < Version(since)
    return f"{model_type} needs transformers {since}" if old else ""


def make_config(name: str, **changes: Any) -> Any:
    """The configuration of a family's tiny model."""
    config_class: Any = CONFIG_MAPPING[name.partition("/")[0]]
    own = ZOO[name] | changes
    if "ffn_config" in own:
        return config_class(vocab_size=VOCABULARY, pad_token_id=0, **own)
    aliases = config_class.attribute_map
    known = set(vars(config_class())) | set(aliases)
    shared = _COMMON | dict.fromkeys(_COUNTS, N_EXPERTS)
    chosen = {key: value for key, value in shared.items() if key in known}
    merged = {aliases.get(key, key): value for key, value in chosen.items()}
    merged |= {aliases.get(key, key): value for key, value in own.items()}
    return config_class(**merged)


def build(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in float32, ready to run."""
    config = make_config(name, **changes)
    torch.manual_seed(seed)
    return randomised(_class_of(name, config)(config), seed)


def _class_of(name: str, config: Any) -> Any:
    """A function that makes the model of a configuration, with a head where there is one."""
    place = _MODELS.get(name.partition("/")[0])
    if place is not None:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)._from_config
    with_head = type(config) in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if with_head else AutoModel).from_config


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with weights large enough that routing differs from token to token."""
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            size = _size(name, value)
            if size:
                value.copy_(torch.randn(value.shape, generator=draw) * size)
            if name.endswith("balancing_biases"):
                value[-1] = -1.0  # of the skip expert; transformers sets it so on every load
            if name.endswith("tid2eid"):
                shuffled = torch.rand(value.shape[0], N_EXPERTS, generator=draw).argsort(dim=1)
                value.copy_(shuffled[:, : value.shape[1]])
    return model.eval()


def _size(name: str, value: torch.Tensor) -> float:
    """Standard deviation of a tensor's values; 0 leaves it."""
    last = name.rpartition(".")[2]
    if last in ("e_score_correction_bias", "expert_bias", "balancing_biases"):
        return 0.1
    if last.endswith("bias"):
        return 0.05
    if last.endswith("decay") or last == "slope_rate":
        return 0.0  # tables of lightning attention, without which it looks ahead
    return 0.15 if value.dim() >= 2 and value.is_floating_point() else 0.0


def batch() -> dict[str, torch.Tensor]:
    """Two rows of twelve positions, the first with four of padding at its end."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=draw)
    real = torch.ones_like(ids)
    real[0, 8:] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def output_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model, or its last hidden states."""
    with torch.inference_mode():
        out = model(**inputs)
    return (out.logits if getattr(out, "logits", None) is not None else out[0]).clone()
