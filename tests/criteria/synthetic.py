"""Small activations on disk, made from plain arrays."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from moecollab.manifest import MANIFEST, manifest, write_json
from moecollab.record import schema
from moecollab.record.activations import load_activations
from moecollab.record.tallies import Tallies


@dataclass(frozen=True)
class Recorded:
    """What the routers did: arrays of shape (n_layers, n_tokens, top_k), `sample` per token."""

    expert: np.ndarray
    weight: np.ndarray
    norm: np.ndarray | None
    sample: np.ndarray
    n_experts: int
    layers: tuple[int, ...] = (1, 3)
    domains: tuple[str, ...] = ("law", "maths")

    def relabelled(self, order):
        """The same, with expert `order[i]` called `i`."""
        return self.changed(expert=np.argsort(order)[self.expert].astype(np.uint16))

    def part(self, tokens):
        """The same for some of the tokens."""
        norm = None if self.norm is None else self.norm[:, tokens]
        return self.changed(
            expert=self.expert[:, tokens],
            weight=self.weight[:, tokens],
            norm=norm,
            sample=self.sample[tokens],
        )

    def changed(self, **fields):
        return Recorded(**(vars(self) | fields))

    def tallies(self):
        """Sums by domain, one token at a time."""
        n_layers, n_tokens, top_k = self.expert.shape
        groups = ["routing"] if self.norm is None else ["routing", "norms"]
        found = Tallies.zeros(self.domains, n_layers, self.n_experts, groups=groups)
        norm = np.zeros(self.expert.shape) if self.norm is None else self.norm
        for layer, token, slot in np.ndindex(n_layers, n_tokens, top_k):
            at = (self.domain(token), layer, self.expert[layer, token, slot])
            g, f = (float(values[layer, token, slot]) for values in (self.weight, norm))
            if g == 0:
                continue
            added = {"count": 1, "sum_weight": g, "sum_weight_sq": g * g}
            if self.norm is not None:
                added |= {"sum_norm": f, "sum_norm_sq": f * f, "sum_weighted_norm": g * f}
                added["sum_weighted_norm_sq"] = (g * f) ** 2
                found["max_abs"][at] = max(found["max_abs"][at], f)
            for name, value in added.items():
                found[name][at] += value
        return found

    def domain(self, token):
        return int(self.sample[token]) % len(self.domains)

    def save(self, folder):
        folder.mkdir()
        _, n_tokens, top_k = self.expert.shape
        length = np.bincount(self.sample)
        about = manifest("activations", 1, settings={"norms": self.norm is not None}) | {
            "model": {
                "class": "Synthetic",
                "model_type": "synthetic",
                "layers": list(self.layers),
                "n_experts": self.n_experts,
                "top_k": top_k,
                "path": "synthetic",
            },
            "corpus": {
                "n_tokens": n_tokens,
                "n_samples": len(length),
                "domains": list(self.domains),
            },
        }
        write_json(folder / MANIFEST, about)
        self.tallies().save(folder / schema.TALLIES)
        token = {
            "token": np.arange(n_tokens),
            "sample": self.sample,
            "position": np.concatenate([np.arange(n) for n in length]),
        }
        write = schema.write_table
        ids = pl.DataFrame(token | {"token_id": np.arange(n_tokens)}, schema=schema.TOKEN_COLUMNS)
        write(ids, folder / schema.TOKENS)
        words = {"token_id": range(n_tokens), "text": [f"w{i}" for i in range(n_tokens)]}
        write(pl.DataFrame(words, schema=schema.VOCABULARY_COLUMNS), folder / schema.VOCABULARY)
        samples = {
            "sample": range(len(length)),
            "domain": [self.domains[i % len(self.domains)] for i in range(len(length))],
            "n_tokens": length,
            "text_start": [f"text {i}" for i in range(len(length))],
        }
        write(pl.DataFrame(samples, schema=schema.SAMPLE_COLUMNS), folder / schema.SAMPLES)
        columns = schema.layer_columns(top_k, norms=self.norm is not None)
        for row, layer in enumerate(self.layers):
            table = token | {"expert": self.expert[row], "weight": self.weight[row]}
            table |= {} if self.norm is None else {"norm": self.norm[row]}
            write(pl.DataFrame(table, schema=columns), folder / schema.layer_file(layer))
        return load_activations(folder)


def make_recorded(n_tokens=60, n_experts=6, top_k=2, *, norms=True, seed=0):
    """Random routing in which two groups of experts work together and the last is never used."""
    rng = np.random.default_rng(seed)
    used = n_experts - 1
    sample = np.sort(rng.integers(0, 5, n_tokens - 5).tolist() + list(range(5)))
    group = rng.integers(0, 2, n_tokens)
    logits = rng.normal(size=(2, n_tokens, used)) + 2 * (np.arange(used) % 2 == group[:, None])
    expert = np.argsort(-logits, axis=2)[:, :, :top_k]
    chosen = np.exp(np.take_along_axis(logits, expert, axis=2))
    norm = rng.uniform(0.5, 2, chosen.shape).astype(np.float32) if norms else None
    return Recorded(
        expert=expert.astype(np.uint16),
        weight=(chosen / chosen.sum(axis=2, keepdims=True)).astype(np.float32),
        norm=norm,
        sample=sample,
        n_experts=n_experts,
    )
