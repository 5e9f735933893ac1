"""Layouts for a family of remote code whose experts are modules."""

from transformers import AutoModelForCausalLM

import moecollab as mc
from moecollab.models.layout import Layout
from moecollab.models.registry import register_layout


def register_sorted():
    """The router returns ids and weights: that is all there is to say."""
    register_layout(
        Layout(
            family="small_moe",  # model_type in config.json
            count="n_routed_experts",  # its field with the number of experts
            rows=("gate.weight",),  # in the block: cut along when experts go
            router="gate",
            experts="experts",
            capture="modules",
        )
    )


def choose(block, logits):
    """Ids and weights as the block makes them of the router's logits."""
    weight, ids = logits.softmax(dim=-1).topk(block.top_k, dim=-1)
    return ids, weight / weight.sum(dim=-1, keepdim=True)


def register_looped():
    """The router returns logits: the layout says what the block makes of them."""
    register_layout(
        Layout(
            family="small_moe",
            count="n_routed_experts",
            rows=("gate.weight",),
            capture="modules",
            routing=choose,
        )
    )


def record(folder, texts, tokenizer, out):
    """Activations of a model that brings its own code; that is run only because you say so."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return mc.extract(model, texts, tokenizer=tokenizer, out=out)
