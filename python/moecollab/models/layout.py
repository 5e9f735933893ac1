"""Where routers and experts live in each model family: data, one row per family.

Capture needs none of this: routed experts are containers called with
``(hidden_states, top_k_index, top_k_weights)`` and are found by that signature. A layout says what
must be cut, in the router and in the container, when experts go.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecollab.errors import SettingsError

_GATE = ("gate.weight",)
_BIASED_GATE = ("gate.weight", "gate.e_score_correction_bias")
_ROUTER = ("router.weight",)

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "total_experts",
    "n_total_experts",
    "out_features",
)
"""Attributes of routers, containers and blocks that cache the number of experts."""

CONFIG_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Configuration fields that only a Mixture-of-Experts model has."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the MoE blocks of one family are built; paths are relative to the block.

    Parameters
    ----------
    family : str
        ``model_type`` of the configuration.
    count : str
        Configuration field with the number of routed experts; a dot descends.
    rows : tuple of str
        Tensors with one entry per expert that decide the routing, cut along their longest
        dimension of that size: router weights, correction biases. Entries past the experts
        (skip or shared experts) stay. Names that a model lacks are passed over, but the first.
    router : str
        The module that scores the experts.
    experts : str
        The container that is called with ids and weights.
    tensors : tuple of str
        Tensors of the container with one slice per expert along dimension 0.
    flat : bool
        Whether `tensors` are 2-D, with the experts stacked along dimension 0.
    top_k : str
        Configuration field with the number of experts per token, where the router has no
        ``top_k`` of its own.
    capture : str
        How the experts are listened to; a key of :data:`moecollab.models.capture.CAPTURES`.
    fixed : str
        Why experts cannot be masked or cut yet; empty where they can.
    """

    family: str
    count: str
    rows: tuple[str, ...] = _GATE
    router: str = "gate"
    experts: str = "experts"
    tensors: tuple[str, ...] = (
        "gate_up_proj",
        "gate_up_proj_bias",
        "up_proj",
        "up_proj_bias",
        "down_proj",
        "down_proj_bias",
    )
    flat: bool = False
    top_k: str = "num_experts_per_tok"
    capture: str = "container"
    fixed: str = ""

    def __post_init__(self) -> None:
        """Refuses a layout without a name, a count or router rows."""
        for name in ("family", "count", "rows", "experts"):
            if not getattr(self, name):
                raise SettingsError(name, getattr(self, name), "given in a layout")


def _rows(count: str, rows: tuple[str, ...], router: str, *families: str) -> list[Layout]:
    return [Layout(family=name, count=count, rows=rows, router=router) for name in families]


_PLAIN = [
    *_rows("num_experts", _GATE, "gate", "qwen2_moe", "qwen3_next", "qwen3_5_moe"),
    *_rows("num_experts", _GATE, "gate", "qwen4_exp", "olmoe", "flex_olmo"),
    *_rows("num_experts", _GATE, "gate", "cohere2_moe", "flint", "qwen3_omni_moe"),
    *_rows("num_local_experts", _GATE, "gate", "mixtral", "qwen3_moe", "qwen3_vl_moe"),
    *_rows("num_local_experts", _GATE, "gate", "minimax", "mellum"),
    *_rows("n_routed_experts", _GATE, "gate", "deepseek_v2", "mistral4", "mistral_large4"),
    *_rows("n_routed_experts", _GATE, "gate", "deepseek_ocr2", "unlimited_ocr"),
]

_BIASED = [
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "deepseek_v3", "deepseek_v32"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "glm4_moe", "glm4_moe_lite"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "glm_moe_dsa", "glm4v_moe", "glm5_next"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "dots1", "dots3_note", "nemotron_h"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "solar_open", "axk1", "axk2", "hy_v4"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "inkling", "inkling2", "mimo_v2_flash"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "step3p7", "step3p5"),
    *_rows("num_experts", _BIASED_GATE, "gate", "bailing_hybrid", "kimi_linear", "exaone_moe"),
    *_rows("num_experts", _BIASED_GATE, "gate", "beam", "laguna"),
    *_rows("num_local_experts", _BIASED_GATE, "gate", "kolibri1", "minimax_m3_vl"),
    *_rows("num_local_experts", _BIASED_GATE, "gate", "muse_spark"),
]

_ROUTED = [
    *_rows("num_local_experts", _ROUTER, "router", "phimoe", "granitemoe", "granitemoeshared"),
    *_rows("num_local_experts", _ROUTER, "router", "granitemoe_swa", "granitemoehybrid"),
    *_rows("num_experts", _ROUTER, "router", "jamba"),
    *_rows("moe_num_experts", _ROUTER, "router", "aria_text"),
]

_SPECIAL = [
    Layout(
        family="gpt_oss",
        count="num_local_experts",
        rows=("router.weight", "router.bias"),
        router="router",
    ),
    Layout(
        family="openai_privacy_filter",
        count="num_local_experts",
        rows=("router.weight", "router.bias"),
        router="router",
    ),
    Layout(
        family="ernie4_5_moe",
        count="moe_num_experts",
        rows=("gate.weight", "gate.moe_statics.e_score_correction_bias"),
        top_k="moe_k",
    ),
    Layout(family="hunyuan_v1_moe", count="num_experts", rows=("gate.wg.weight",)),
    Layout(family="hy_v3", count="num_experts", rows=("gate.weight", "e_score_correction_bias")),
    Layout(
        family="minimax_m2",
        count="num_local_experts",
        rows=("gate.weight", "e_score_correction_bias"),
    ),
    Layout(family="lfm2_moe", count="num_experts", rows=("gate.weight", "expert_bias")),
    Layout(
        family="afmoe",
        count="num_experts",
        rows=("router.gate.weight", "expert_bias"),
        router="router",
    ),
    Layout(
        family="gemma4",
        count="num_experts",
        rows=("router.proj.weight", "router.per_expert_scale"),
        router="router",
        top_k="top_k_experts",
    ),
    Layout(
        family="dbrx",
        count="ffn_config.moe_num_experts",
        rows=("router.layer.weight",),
        router="router",
        tensors=("mlp.w1", "mlp.v1", "mlp.w2"),
        flat=True,
        top_k="ffn_config.moe_top_k",
    ),
    Layout(
        family="deepseek_v4",
        count="n_routed_experts",
        rows=_BIASED_GATE,
        fixed="its hash layers choose experts by token id from a table",
    ),
    Layout(
        family="zaya",
        count="num_experts",
        rows=("gate.router_mlp.out_proj.weight", "gate.balancing_biases"),
        fixed="its router reads the number of experts from the configuration while it runs",
    ),
]

BUILT_IN: dict[str, Layout] = {
    layout.family: layout for layout in (*_PLAIN, *_BIASED, *_ROUTED, *_SPECIAL)
}
"""The layouts that come with the package, by family."""
