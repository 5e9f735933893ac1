"""Tunes a carved model to its dense parent: their next-token distributions are drawn together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecollab.demo import train
from moecollab.progress import track

_CHUNK = 256  # tokens whose logits over the vocabulary are held at once


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a tuning run is made of; written beside its checkpoint and compared when it resumes."""

    steps: int = 120
    """Optimiser steps."""
    rows: int = 4
    """Windows of a step."""
    length: int = 256
    """Tokens of a window."""
    rate: float = 3e-4
    """Peak learning rate (cosine to a twentieth, after a warm-up)."""
    warmup: int = 16
    """Steps over which the rate rises."""
    seed: int = 0
    """Seed of the carve and of the order of windows."""

    def rate_at(self, step: int) -> float:
        """Learning rate of one step."""
        schedule = train.Recipe(steps=self.steps, rate=self.rate, warmup=self.warmup)
        return schedule.rate_at(step)


def divergence(hidden: Tensor, wanted: Tensor, head: Tensor, teacher_head: Tensor) -> float:
    """Mean KL (nats) from the parent's distribution to ours; its gradient goes to `hidden`.

    Takes final hidden states (t, d) of both models and their output heads (vocabulary, d). The
    gradient is taken piece by piece, so that few logits are held, and then sent on at once.
    """
    states = hidden.detach().requires_grad_()
    total = 0.0
    for ours, theirs in zip(states.split(_CHUNK), wanted.split(_CHUNK), strict=True):
        with torch.no_grad():
            target = (theirs @ teacher_head.T).log_softmax(dim=-1)
        found = (ours @ head.T).log_softmax(dim=-1)
        part = torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)
        part = part / len(hidden)
        part.backward()
        total += float(part.detach())
    hidden.backward(states.grad)
    return total


def make_optimiser(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam on routed layers and the norms after the first of them; the rest is frozen.

    Down projections are stored `top_k` (routed) or 2 (shared) times larger than what reaches the
    residual stream, so their rates are, too.
    """
    first = len(model.config.mlp_only_layers)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_tuned(name, first))
        if parameter.requires_grad:
            routed = "experts.down_proj" in name
            shared = "shared_expert.down_proj" in name
            factor = model.config.num_experts_per_tok if routed else 2.0 if shared else 1.0
            groups.setdefault(float(factor), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": found, "factor": factor} for factor, found in sorted(groups.items())],
        lr=recipe.rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


def is_tuned(name: str, first: int) -> bool:
    """Whether a parameter learns: experts, routers and norms from layer `first` on."""
    if not name.startswith("model.layers."):
        return name == "model.norm.weight"
    return int(name.split(".")[2]) >= first and (".mlp." in name or "norm" in name)


def tune_step(model: Any, dense: Any, optimiser: Any, ids: Tensor, rate: float) -> float:
    """One update on windows (rows, length); returns the divergence before it."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]
    with torch.no_grad():
        wanted = dense.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    found = divergence(hidden, wanted, model.lm_head.weight, dense.lm_head.weight)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return found


def tune(
    run: train.Run, model: Any, dense: Any, windows: NDArray[np.int64], *, every: int = 20
) -> Any:
    """Tunes the model to the recipe's last step, from the newest checkpoint if there is one.

    Step s reads the next `rows` windows, so a window is read again only when all have been read.
    """
    recipe = run.recipe
    model.set_experts_implementation("grouped_mm")
    optimiser = make_optimiser(model, recipe)
    done = run.restore(model, optimiser)
    model.train()
    with track("tune", total=recipe.steps) as bar, (run.work / "log.csv").open("a") as log:
        bar.advance(done)
        for step in range(done, recipe.steps):
            rows = np.arange(step * recipe.rows, (step + 1) * recipe.rows) % len(windows)
            ids = torch.from_numpy(windows[rows])
            found = tune_step(model, dense, optimiser, ids, recipe.rate_at(step))
            log.write(f"{step},{found:.5f}\n")
            log.flush()
            bar.advance()
            bar.remark(f"divergence {found:.3f}")
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                run.save(model, optimiser, step + 1)
    return model.eval()
