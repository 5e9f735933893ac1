"""Trains the embedded model from scratch: ``python -m moecollab.demo.train DATA --work DIR``.

A small Qwen2-MoE (shared and routed experts) learns next tokens of 20 domains of text and of
relation facts. Its own tokenizer, the weights in bfloat16 and a model card go to ``--out``. The run
checkpoints and resumes; batches depend on the seed and the step alone.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moecollab import progress
from moecollab.demo.training_text import (
    END,
    Batches,
    FactSampler,
    TrainingText,
    encode_streams,
    learn_tokenizer,
    read_training_text,
)
from moecollab.manifest import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the run is made of; written beside its checkpoint and compared when it resumes."""

    steps: int = 1_950
    """Optimiser steps."""
    tokens_per_step: int = 8_192
    """Tokens of one batch."""
    rate: float = 3e-3
    """Peak learning rate (cosine to a twentieth, after a warm-up)."""
    warmup: int = 100
    """Steps over which the rate rises."""
    balance: float = 0.003
    """Weight of the load-balancing loss of each layer."""
    fact_share: float = 0.08
    """Share of windows made of fact sentences."""
    vocabulary: int = 4_096
    """Pieces of the tokenizer."""
    seed: int = 0
    """Seed of weights and batches."""

    def window(self, step: int) -> int:
        """Tokens per window: 256, and 512 for the last fifth, so that positions reach 512."""
        return 256 if step < 0.8 * self.steps else 512

    def rate_at(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Settings of a model that learns this text, whatever its experts are."""


def build_model(recipe: Recipe) -> PreTrainedModel:
    """A fresh model: 6 layers, 24 routed experts (top 3) and one shared expert in each."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=recipe.vocabulary,
        intermediate_size=256,
        num_experts=24,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        norm_topk_prob=True,
        qkv_bias=False,
        **SHAPE,
    )
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = Qwen2MoeForCausalLM(config)
    return model


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of E · Σ_e f_e p_e (Switch Transformer, eq. 4); 1 when perfectly even.

    `router_logits` holds one (n_tokens, n_experts) tensor a layer; f is the share of choices of an
    expert and p its mean probability over the whole batch, so single domains may be uneven.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)  # (n_tokens, n_experts)
        chosen = probability.topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (share * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def make_optimiser(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)


def train_step(
    model: Any,  # noqa: ANN401 (a transformers model; its call is untyped)
    optimiser: torch.optim.Optimizer,
    ids: NDArray[np.int64],
    recipe: Recipe,
    step: int,
) -> tuple[float, float]:
    """One update; returns the language loss (nats per token) and the balance loss."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate_at(step)
    batch = torch.from_numpy(ids)
    out = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
    balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
    (out.loss + recipe.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(out.loss.detach()), float(balance.detach())


@dataclass
class Run:
    """A run's files: recipe, tokenizer, token streams and the newest checkpoint."""

    work: Path
    recipe: Recipe

    @property
    def checkpoint(self) -> Path:
        """The newest state of model and optimiser."""
        return self.work / "checkpoint.pt"

    def open(self) -> None:
        """Makes the folder, or checks that it belongs to the same recipe."""
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.work / "recipe.json"
        if file.exists() and read_json(file) != asdict(self.recipe):
            raise typer.BadParameter(f"{self.work} holds a run with another recipe; choose another")
        write_json(file, asdict(self.recipe), overwrite=True)

    def tokenizer(self, text: TrainingText) -> Tokenizer:
        """The tokenizer, learnt once."""
        file = self.work / "tokenizer.json"
        if not file.exists():
            learn_tokenizer(text, self.recipe.vocabulary).save(str(file))
        return Tokenizer.from_file(str(file))

    def streams(self, text: TrainingText, tokenizer: Tokenizer) -> dict[str, NDArray[np.uint16]]:
        """Encoded training text, made once."""
        file = self.work / "streams.npz"
        if not file.exists():
            streams: dict[str, Any] = dict(encode_streams(text, tokenizer))
            np.savez(self.work / "streams.partial.npz", **streams)
            (self.work / "streams.partial.npz").replace(file)
        with np.load(file) as found:
            return {domain: found[domain] for domain in found.files}

    def save(self, model: PreTrainedModel, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Writes the checkpoint beside the old one, then takes its place."""
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
        torch.save(state, self.work / "checkpoint.partial")
        (self.work / "checkpoint.partial").replace(self.checkpoint)

    def restore(self, model: PreTrainedModel, optimiser: torch.optim.Optimizer) -> int:
        """Loads the checkpoint if there is one; returns the number of steps done."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])


def train(
    run: Run,
    batches: Batches,
    *,
    build: Callable[[Recipe], PreTrainedModel] = build_model,
    every: int = 100,
) -> PreTrainedModel:
    """Trains to the recipe's last step, from the newest checkpoint if there is one."""
    recipe = run.recipe
    model = build(recipe)
    optimiser = make_optimiser(model, recipe)
    done = run.restore(model, optimiser)
    model.train()
    with (
        progress.track("train", total=recipe.steps) as bar,
        (run.work / "log.csv").open("a") as log,
    ):
        bar.advance(done)
        for step in range(done, recipe.steps):
            length = recipe.window(step)
            ids = batches.batch(step, recipe.tokens_per_step // length, length)
            loss, balance = train_step(model, optimiser, ids, recipe, step)
            bar.advance()
            bar.remark(f"loss {loss:.3f}, balance {balance:.3f}")
            log.write(f"{step},{loss:.5f},{balance:.5f}\n")
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                log.flush()
                run.save(model, optimiser, step + 1)
    return model.eval()


def save_model(model: PreTrainedModel, tokenizer_file: Path, out: Path) -> None:
    """Writes the model in bfloat16 and its tokenizer as a stock transformers folder."""
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token=END, bos_token=END, pad_token=END
    )
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(out)


Data = Annotated[Path, typer.Argument(help="Folder with corpus/*.parquet and facts/")]
Work = Annotated[Path, typer.Option(help="Folder for checkpoints; a killed run resumes")]
Out = Annotated[Path, typer.Option(help="Folder the finished model goes to")]
Steps = Annotated[int, typer.Option(help="Optimiser steps")]
Seed = Annotated[int, typer.Option(help="Seed of weights and batches")]
Threads = Annotated[int, typer.Option(help="Torch threads")]


def main(
    data: Data,
    work: Work,
    out: Out,
    steps: Steps = Recipe.steps,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """Trains the embedded model and writes its card."""
    from moecollab.demo.model_card import write_card

    torch.set_num_threads(threads)
    run = Run(work, Recipe(steps=steps, seed=seed))
    with progress.show():
        run.open()
        text = read_training_text(data)
        tokenizer = run.tokenizer(text)
        streams = run.streams(text, tokenizer)
        facts = FactSampler.build(text.facts, tokenizer)
        model = train(run, Batches(streams, facts, run.recipe.fact_share, seed))
        save_model(model, work / "tokenizer.json", out)
        write_card(out, text, run.recipe, streams, work)
    shutil.copy(work / "log.csv", out / "training_log.csv")


if __name__ == "__main__":
    typer.run(main)
