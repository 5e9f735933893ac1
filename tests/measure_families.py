"""Measures how well what is recorded of every family recomputes its sums.

`python tests/measure_families.py` writes families.json beside it, which docs/models.md shows.
"""

import json
import warnings

import torch
import transformers

import zoo
from expert_twin import routed_sum
from make_docs import MEASURED
from moecollab.models.registry import layout_of
from moecollab.models.routing import find_moe_layers, text_config
from test_families import IMPLEMENTATIONS, listened, spied


def error_of(model):
    """Largest distance between a layer's sum and the one from what was recorded."""
    layers, inputs = find_moe_layers(model), zoo.batch()
    spies, _ = spied(layers, model, inputs)
    heard, _ = listened(layers, model, inputs)
    config = text_config(model)
    with torch.inference_mode():
        return max(
            float((routed_sum(layer, config, spy.hidden, one) - spy.output).abs().max())
            for layer, spy, one in zip(layers, spies, heard, strict=True)
        )


def measure(name):
    """Family, implementations of experts that it can be set to, and the largest error of all."""
    model, errors = zoo.build(name), {}
    for implementation in IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(implementation)
        except ValueError:
            continue
        errors[implementation] = error_of(model)
    family = layout_of(zoo.make_config(name).model_type, name).family
    return family, sorted(errors), max(errors.values())


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name in zoo.ZOO:
        family, ways, error = measure(name)
        worst = max(error, found.get(family, {}).get("error", 0.0))
        found[family] = {"error": float(f"{worst:.1e}"), "implementations": ways}
    text = json.dumps({"transformers": transformers.__version__, "families": found}, indent=1)
    MEASURED.write_text(text + "\n")


if __name__ == "__main__":
    main()
