"""Measures the embedded model and writes its card: what it learnt from, what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

import moecollab as mc
from moecollab.demo.training_text import TrainingText
from moecollab.manifest import write_json
from moecollab.progress import track

if TYPE_CHECKING:
    from moecollab.demo.train import Recipe

_CHARS = 40_000  # held-out characters of each domain that are measured


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the card tells."""

    domains: pl.DataFrame
    """domain, train_tokens, loss, entropy (nats per token)."""
    divergence: pl.DataFrame
    """layer, mean and largest Jensen–Shannon divergence between domains (bits), chosen pairs."""
    pruned: list[float]
    """Held-out loss with a random half of the experts dropped, one per seed."""
    loss: float
    """Held-out loss of the full model."""
    facts: pl.DataFrame
    """relation, facts, hit10."""


def held_out_documents(text: TrainingText, chars: int = _CHARS) -> list[dict[str, str]]:
    """The first held-out characters of each domain, as documents."""
    documents = []
    for domain, texts in text.held_out.items():
        left = chars
        for number, document in enumerate(texts):
            if left <= 0:
                break
            documents.append(
                {"text": document[:left], "domain": domain, "id": f"{domain}/{number}"}
            )
            left -= len(document)
    return documents


def js_divergence(use: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen–Shannon divergence in bits between all pairs of rows of counts (n, n_experts)."""
    share = use / use.sum(axis=1, keepdims=True)
    middle = 0.5 * (share[:, None] + share[None])

    def entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = np.where(p > 0, p * np.log2(np.where(p > 0, p, 1.0)), 0.0)
        return np.asarray(-terms.sum(axis=-1))

    alone = entropy(share)
    result: NDArray[np.float64] = entropy(middle) - 0.5 * (alone[:, None] + alone[None])
    return result


def measure(out: Path, text: TrainingText, streams: Mapping[str, Any], work: Path) -> Measured:
    """Everything on the card, through the public API."""
    documents = held_out_documents(text)
    full = mc.evaluate(out, corpus=documents, dtype="float32")
    acts = mc.extract(
        out, documents, out=work / "card-activations", norms=False, dtype="float32", overwrite=True
    )
    return Measured(
        domains=_domain_table(full, acts, streams),
        divergence=_divergence_table(acts),
        pruned=[_half_dropped(out, acts, documents, seed) for seed in range(3)],
        loss=full.loss,
        facts=fact_recall(out, text.facts),
    )


def _domain_table(
    full: mc.Evaluation, acts: mc.Activations, streams: Mapping[str, Any]
) -> pl.DataFrame:
    """Loss and unigram entropy of each domain, both on the same held-out tokens."""
    domain_of = dict(acts.samples().select("sample", "domain").iter_rows())
    tokens = acts.tokens().select("token_id", pl.col("sample").replace_strict(domain_of))
    rows = []
    for domain in acts.domains:
        counts = np.bincount(tokens.filter(pl.col("sample") == domain)["token_id"].to_numpy())
        share = counts[counts > 0] / counts.sum()
        rows.append(
            {
                "domain": domain,
                "train_tokens": len(streams[domain]),
                "loss": full.by_domain[domain],
                "entropy": float(-(share * np.log(share)).sum()),
            }
        )
    return pl.DataFrame(rows)


def _divergence_table(acts: mc.Activations) -> pl.DataFrame:
    """Divergence of expert use between domains in each layer."""
    counts = acts.tallies().count.astype(np.float64)  # (n_domains, n_layers, n_experts)
    place = {domain: number for number, domain in enumerate(acts.domains)}
    rows = []
    for position, layer in enumerate(acts.layers):
        matrix = js_divergence(counts[:, position])
        upper = matrix[np.triu_indices(len(matrix), 1)]
        row: dict[str, float] = {"layer": layer, "mean": upper.mean(), "largest": upper.max()}
        for a, b in combinations(("code", "maths", "fiction"), 2):
            if a in place and b in place:
                row[f"{a}–{b}"] = matrix[place[a], place[b]]
        rows.append(row)
    return pl.DataFrame(rows)


def _half_dropped(
    out: Path, acts: mc.Activations, documents: list[dict[str, str]], seed: int
) -> float:
    """Held-out loss with a random half of the experts of each layer dropped."""
    plan = mc.plan(mc.score("random", acts, seed=seed), drop=0.5, per="layer")
    with mc.mask(out, plan, dtype="float32") as masked:
        return mc.evaluate(masked, corpus=documents).loss


@torch.inference_mode()
def fact_recall(out: Path, facts: pl.DataFrame) -> pl.DataFrame:
    """Share of each relation's facts whose object's first token is among the ten likeliest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    hits = []
    with track("recall facts", total=len(facts)) as bar:
        for batch in facts.iter_slices(64):
            hits += _hits(model, tokenizer, batch)
            bar.advance(len(batch))
    return (
        facts.with_columns(hit=pl.Series(hits))
        .group_by("relation")
        .agg(facts=pl.len(), hit10=pl.col("hit").mean())
        .sort("hit10", descending=True)
    )


def _hits(model: Any, tokenizer: Any, batch: pl.DataFrame) -> list[bool]:  # noqa: ANN401
    """Whether each prompt's object begins with one of the ten likeliest next tokens."""
    prompts = [tokenizer.encode(prompt) for prompt in batch["prompt"]]
    wanted = [tokenizer.encode(f" {name}")[0] for name in batch["object"]]
    length = max(len(ids) for ids in prompts)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in prompts])
    last = torch.tensor([len(ids) - 1 for ids in prompts])
    logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(prompts)), last]
    best = logits.topk(10, dim=-1).indices  # (rows, 10)
    found: list[bool] = (best == torch.tensor(wanted)[:, None]).any(-1).tolist()
    return found


def write_card(
    out: Path, text: TrainingText, recipe: Recipe, streams: Mapping[str, Any], work: Path
) -> None:
    """Measures the model in `out` and writes README.md and card.json beside its weights."""
    found = measure(out, text, streams, work)
    numbers = {
        "loss": found.loss,
        "loss_random_half_dropped": found.pruned,
        "domains": found.domains.to_dicts(),
        "divergence": found.divergence.to_dicts(),
        "facts": found.facts.to_dicts(),
        "steps": recipe.steps,
        "tokens_seen": recipe.steps * recipe.tokens_per_step,
    }
    write_json(out / "card.json", numbers, overwrite=True)
    (out / "README.md").write_text(_card(found, recipe))


def _table(frame: pl.DataFrame) -> str:
    """A Markdown table with numbers at three decimals."""
    lines = [" | ".join(frame.columns), " | ".join("---" for _ in frame.columns)]
    for row in frame.iter_rows():
        lines.append(" | ".join(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in row))
    return "\n".join(f"| {line} |" for line in lines)


def _card(found: Measured, recipe: Recipe) -> str:
    """The card's text."""
    cost = [loss - found.loss for loss in found.pruned]
    n_facts = int(found.facts["facts"].sum())
    recalled = float((found.facts["facts"] * found.facts["hit10"]).sum()) / n_facts
    seen = recipe.steps * recipe.tokens_per_step
    return f"""# The embedded model

A Qwen2-MoE (stock transformers) with 6 layers, 24 routed experts a layer (top 3) and one shared
expert, made for `moecollab demo`. It is a teaching model: it has real structure to look at, and
little knowledge. Made by `python -m moecollab.demo.train`, seed {recipe.seed}.

- **Data**: text in {len(found.domains)} domains (textbooks, documentation, encyclopedia, law,
  fiction, questions …) and relation facts ({recipe.fact_share:.0%} of the windows). 4 % of each
  domain's documents, at least one, were never learnt from.
- **Training**: {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens = {seen / 1e6:.1f} M
  tokens, AdamW, peak rate {recipe.rate}, load-balancing weight {recipe.balance} in each layer.
- **Held-out loss**: {found.loss:.3f} nats a token.
- **Pruning hurts**: dropping a random half of the experts of each layer costs
  {np.mean(cost):.3f} nats ({", ".join(f"{c:.3f}" for c in cost)} for three seeds).
- **Facts**: the object's first token is among the ten likeliest for {recalled:.0%} of the
  {n_facts:,} facts, all of which it saw.

## Held-out loss by domain

Nats a token, beside the entropy of the same tokens' unigram distribution.

{_table(found.domains)}

## How differently the domains route

Jensen–Shannon divergence of expert use in bits: mean and largest over all pairs of domains, and
three pairs.

{_table(found.divergence)}

## HIT@10 by relation

{_table(found.facts)}
"""
