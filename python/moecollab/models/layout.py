"""Where routers and experts live in each model family: data, one row per family.

Most routed experts are containers called with ``(hidden_states, top_k_index, top_k_weights)``,
which says all that recording needs; a layout names the families that do otherwise. It also says
what must be cut, in the router and in the container, when experts go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moecollab.errors import SettingsError

CONTAINERS = ("container", "expanded")
"""Ways of listening for which a container is called with hidden states, ids and weights."""

CAPTURED = (*CONTAINERS, "scaled_input", "sorted", "modules")
"""All ways of listening: keys of :data:`moecollab.models.capture.CAPTURES`."""

SCORED = ("softmax", "sigmoid", "sqrt_softplus", "probabilities")
"""What routers make of logits: keys of :data:`moecollab.models.probability.SCORES`."""

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
    "num_router_classes",
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
        The container that is called with ids and weights, or the list of experts.
    tensors : tuple of str
        Tensors of the container with one slice per expert along dimension 0.
    flat : bool
        Whether `tensors` are 2-D, with the experts stacked along dimension 0.
    top_k : str
        Configuration field with the number of experts per token, where the router has no
        ``top_k`` of its own.
    capture : str
        How the experts are listened to; a key of :data:`moecollab.models.capture.CAPTURES`.
    routing : callable, optional
        For ``capture="modules"`` where the router does not return ids and weights: a function of
        the block and of what its router returned that gives both, each (n_positions, top_k).
    scale : str
        Attribute of the block with a factor on the weighted sum of the outputs, where the weights
        do not hold it; or with ``"average"`` where the sum is averaged with shared experts.
    scoring : str
        What the router makes of its logits, a key of :data:`moecollab.models.probability.SCORES`,
        where the weights do not show it.
    shift : str
        Why it cannot be recorded how far the experts turn the residual stream: what they sum up to
        is not added to it as it is. Empty where it is. With ``capture="modules"``, weights are
        checked only where it is empty.
    live_count : bool
        Whether the router reads `count` from its own ``config`` while it runs.
    fixed : str
        Why experts cannot be masked or cut yet; empty where they can.
    uncut : str
        Why experts can be masked but not cut yet; empty where they can.
    remark : str
        What else a reader of the table in ``docs/models.md`` should know.
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
    routing: Callable[[Any, Any], tuple[Any, Any]] | None = None
    scale: str = ""
    scoring: str = ""
    shift: str = ""
    live_count: bool = False
    fixed: str = ""
    uncut: str = ""
    remark: str = ""

    def __post_init__(self) -> None:
        """Refuses a layout without a name, a count or router rows."""
        for name in ("family", "count", "rows", "experts"):
            if not getattr(self, name):
                raise SettingsError(name, getattr(self, name), "given in a layout")
        for name, known in (("capture", CAPTURED), ("scoring", ("", *SCORED))):
            if getattr(self, name) not in known:
                raise SettingsError(name, getattr(self, name), f"one of {', '.join(known)}")

    @property
    def container(self) -> bool:
        """Whether `experts` is called with hidden states, ids and weights."""
        return self.capture in CONTAINERS


def _rows(count: str, rows: tuple[str, ...], router: str, *families: str) -> list[Layout]:
    return [Layout(family=name, count=count, rows=rows, router=router) for name in families]


_PLAIN = [
    *_rows("num_experts", _GATE, "gate", "qwen2_moe", "qwen3_next", "qwen3_5_moe"),
    *_rows("num_experts", _GATE, "gate", "qwen4_exp", "olmoe", "flex_olmo"),
    *_rows("num_experts", _GATE, "gate", "flint", "qwen3_omni_moe"),
    *_rows("num_local_experts", _GATE, "gate", "mixtral", "qwen3_moe", "qwen3_vl_moe"),
    *_rows("num_local_experts", _GATE, "gate", "minimax", "mellum"),
    *_rows("n_routed_experts", _GATE, "gate", "deepseek_v2", "mistral4", "mistral_large4"),
    *_rows("n_routed_experts", _GATE, "gate", "deepseek_ocr2", "unlimited_ocr"),
]

_BIASED = [
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "deepseek_v3", "deepseek_v32"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "glm4_moe", "glm4_moe_lite"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "glm_moe_dsa", "glm4v_moe", "glm5_next"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "dots1", "dots3_note"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "solar_open", "axk1", "axk2", "hy_v4"),
    *_rows("n_routed_experts", _BIASED_GATE, "gate", "inkling", "inkling2", "mimo_v2_flash"),
    *_rows("num_experts", _BIASED_GATE, "gate", "bailing_hybrid", "kimi_linear", "exaone_moe"),
    *_rows("num_local_experts", _BIASED_GATE, "gate", "kolibri1"),
]

_SCALED = [
    Layout(
        family=family,
        count=count,
        rows=_BIASED_GATE,
        scale="routed_scaling_factor",
        remark="a factor is applied after the weighted sum: the layer's `scale`",
    )
    for family, count in (
        ("beam", "num_experts"),
        ("laguna", "num_experts"),
        ("minimax_m3_vl", "num_local_experts"),
        ("step3p5", "n_routed_experts"),
        ("step3p7", "n_routed_experts"),
    )
]

_ROUTED = [
    Layout(
        family="phimoe",
        count="num_local_experts",
        rows=_ROUTER,
        router="router",
        scoring="softmax",  # each weight is a softmax of its own, over the experts near it
    ),
    *_rows("num_local_experts", _ROUTER, "router", "granitemoe", "granitemoeshared"),
    *_rows("num_local_experts", _ROUTER, "router", "granitemoe_swa", "granitemoehybrid"),
    *_rows("num_experts", _ROUTER, "router", "jamba"),
]

_NAMED = [
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
        scale="num_experts",
        remark="weights are shares of 1 / top_k, undone after the sum: the layer's `scale`",
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
]

_SPECIAL = [
    Layout(
        family="deepseek_v4",
        count="n_routed_experts",
        rows=_BIASED_GATE,
        remark="layers that choose by token id are recorded like others",
        fixed="its hash layers choose experts by token id from a table",
    ),
    Layout(
        family="zaya",
        count="num_experts",
        rows=("gate.router_mlp.out_proj.weight", "gate.balancing_biases"),
        live_count=True,
        remark="the skip expert is a slot that was not used",
    ),
    Layout(
        family="llama4",
        count="num_local_experts",
        rows=("router.weight",),
        router="router",
        capture="scaled_input",
        remark="the weight multiplies the expert's input; recorded outputs are f(weight · x) / "
        "weight, so that weight times output is what the expert adds",
    ),
    Layout(
        family="jetmoe",
        count="num_local_experts",
        rows=("mlp.router.layer.weight",),
        router="mlp.router",
        experts="mlp",
        tensors=("input_linear.weight", "output_linear.weight"),
        capture="sorted",
        remark="the experts of the MLP; those of the attention are not recorded",
        uncut="its attention has experts too, and their number is the same setting",
    ),
    Layout(
        family="longcat_flash",
        count="n_routed_experts",
        rows=(
            "router.classifier.weight",
            "router.classifier.bias",
            "router.e_score_correction_bias",
        ),
        router="router",
        top_k="moe_topk",
        remark="an identity expert is a slot that was not used; the weighted sum holds it",
    ),
    Layout(
        family="ernie4_5_vl_moe",
        count="moe_num_experts",
        rows=("text_moe.gate.weight", "text_moe.gate.moe_statics.e_score_correction_bias"),
        router="text_moe.gate",
        experts="text_moe.experts",
        top_k="moe_k",
        remark="the experts for text, on input without images",
        uncut="its experts for images are as many, by the same setting",
    ),
    Layout(
        family="cohere2_moe",
        count="num_experts",
        scale="shared_expert_combination_strategy",
        remark="where shared experts are averaged in, the layer's `scale` is a half",
    ),
    Layout(
        family="aria_text",
        count="moe_num_experts",
        rows=_ROUTER,
        router="router",
        remark="with transformers 5.18 or newer",
    ),
    Layout(
        family="muse_spark",
        count="num_local_experts",
        rows=_BIASED_GATE,
        remark="outputs are in the experts' own space, after their norm",
    ),
    Layout(
        family="nemotron_h",
        count="n_routed_experts",
        rows=_BIASED_GATE,
        remark="with a latent size, outputs are in that space",
    ),
]

_SCALES = "its layers scale what they add, or the stream"
_NORMS = "a norm follows the sum"
_STREAMS = "it has several residual streams"
_BESIDE = "its experts run beside other parts of the layer"
_NO_SHIFT = {
    **dict.fromkeys(("afmoe", "axk1", "flex_olmo", "gemma4", "kolibri1", "inkling"), _NORMS),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa"), _SCALES),
    **dict.fromkeys(("granitemoehybrid", "beam", "inkling2", "minimax", "zaya"), _SCALES),
    **dict.fromkeys(("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp"), _STREAMS),
    **dict.fromkeys(("cohere2_moe", "longcat_flash"), _BESIDE),
    "jetmoe": "a bias is added to the sum",
    "muse_spark": "its experts work in another space",
    "dbrx": "its norm and its attention are one module",
}

BUILT_IN: dict[str, Layout] = {
    layout.family: replace(layout, shift=_NO_SHIFT.get(layout.family, ""))
    for layout in (*_PLAIN, *_BIASED, *_SCALED, *_ROUTED, *_NAMED, *_SPECIAL)
}
"""The layouts that come with the package, by family."""

REFUSED: dict[str, str] = {
    "doge": "its experts are rows of embeddings that are looked up by product keys, not networks",
    "switch_transformers": "it is an encoder and decoder, and drops tokens past a capacity",
    "nllb-moe": "it is an encoder and decoder, and drops tokens past a capacity",
}
"""Families of transformers that route, and why they cannot be recorded."""
