"""A second model to judge criteria on: OLMoE's routing, learnt from the same text from scratch.

``python benches/models/train_olmoe.py DATA --work DIR --out ~/.cache/moecollab-models/olmoe`` takes
the embedded model's training text, tokenizer, optimiser and schedule. What differs is the routing:
no shared expert, 32 experts with the 4 best of a softmax, whose weights are not scaled to one. A
killed run resumes.
"""

from __future__ import annotations

import torch
import typer

from moecollab.demo.train import (
    SHAPE,
    Data,
    Out,
    Recipe,
    Run,
    Seed,
    Steps,
    Threads,
    Work,
    save_model,
    train,
)
from moecollab.demo.training_text import Batches, FactSampler, read_training_text
from moecollab.progress import show


def build_model(recipe: Recipe):
    """A fresh OLMoE: 6 layers of 32 experts, 4 a token, and nothing that every token shares."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=recipe.vocabulary,
        intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        **SHAPE,
    )
    torch.manual_seed(recipe.seed)
    return OlmoeForCausalLM(config)


def main(
    data: Data,
    work: Work,
    out: Out,
    steps: Steps = Recipe.steps,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """Trains the second model."""
    torch.set_num_threads(threads)
    run = Run(work, Recipe(steps=steps, seed=seed))
    with show():
        run.open()
        text = read_training_text(data)
        tokenizer = run.tokenizer(text)
        batches = Batches(
            run.streams(text, tokenizer),
            FactSampler.build(text.facts, tokenizer),
            run.recipe.fact_share,
            seed,
        )
        model = train(run, batches, build=build_model)
        save_model(model, work / "tokenizer.json", out)


if __name__ == "__main__":
    typer.run(main)
