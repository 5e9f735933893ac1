"""Small activations on disk, made from plain arrays."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from moecollab.manifest import MANIFEST, manifest, write_json
from moecollab.record import schema
from moecollab.record.activations import load_activations
from moecollab.record.sketch import add_tokens
from moecollab.record.tallies import Tallies

PER_TOKEN = ("expert", "weight", "norm", "output", "shift", "probability", "next")
"""Arrays with a layer's axis and then one of tokens."""


@dataclass(frozen=True)
class Recorded:
    """What the routers did: arrays of shape (n_layers, n_tokens, top_k), `sample` per token.

    What may be recorded beside it: `output` (n_layers, n_tokens, top_k, width), `shift` (n_layers,
    n_tokens), `probability` (n_layers, n_tokens, n_experts), `next` (n_layers, n_tokens, n_next).
    """

    expert: np.ndarray
    weight: np.ndarray
    norm: np.ndarray | None
    sample: np.ndarray
    n_experts: int
    layers: tuple[int, ...] = (1, 3)
    domains: tuple[str, ...] = ("law", "maths")
    output: np.ndarray | None = None
    shift: np.ndarray | None = None
    probability: np.ndarray | None = None
    next: np.ndarray | None = None
    token_id: np.ndarray | None = None
    together: bool = False  # whether pairs and vocabularies are summed

    @property
    def collect(self):
        """What is recorded beside routing and norms, as in `sums.GROUPS`."""
        held = {
            "shift": self.shift is not None,
            "channels": self.output is not None,
            "probability": self.probability is not None,
            "pairs": self.together,
            "preferences": self.next is not None,
            "vocabulary": self.together,
        }
        return [name for name in held if held[name]]

    def relabelled(self, order):
        """The same, with expert `order[i]` called `i`."""
        place = np.argsort(order)
        changes = {"expert": place[self.expert].astype(np.uint16)}
        if self.next is not None:
            changes["next"] = place[self.next].astype(np.uint16)
        if self.probability is not None:
            changes["probability"] = self.probability[:, :, order]
        return self.changed(**changes)

    def part(self, tokens):
        """The same for some of the tokens."""
        held = {name: getattr(self, name) for name in PER_TOKEN}
        cut = {name: None if found is None else found[:, tokens] for name, found in held.items()}
        return self.changed(**cut, sample=self.sample[tokens], token_id=self.ids[tokens])

    def changed(self, **fields):
        return replace(self, **fields)

    @property
    def ids(self):
        return np.arange(len(self.sample)) if self.token_id is None else self.token_id

    def tallies(self):
        """Sums by domain, one slot at a time."""
        n_layers, n_tokens, top_k = self.expert.shape
        groups = ["routing", *(["norms"] if self.norm is not None else []), *self.collect]
        width = 0 if self.output is None else self.output.shape[-1]
        found = Tallies.zeros(
            self.domains, n_layers, self.n_experts, groups=groups, width=width
        ).arrays
        for layer, token, slot in np.ndindex(n_layers, n_tokens, top_k):
            at = (self.domain(token), layer, self.expert[layer, token, slot])
            if self.weight[layer, token, slot] != 0:
                for name, value in self._added(layer, token, slot).items():
                    found[name][at] += value
                self._note(found, at, layer, token, slot)
        if self.probability is not None:
            for layer, token in np.ndindex(n_layers, n_tokens):
                found["sum_probability"][self.domain(token), layer] += self.probability[
                    layer, token
                ]
        return Tallies(self.domains, found)

    def _added(self, layer, token, slot):
        """What one slot adds."""
        at = layer, token, slot
        g = float(self.weight[at])
        added = {"count": 1, "sum_weight": g, "sum_weight_sq": g * g}
        if self.norm is not None:
            f = float(self.norm[at])
            added |= {"sum_norm": f, "sum_norm_sq": f * f, "sum_weighted_norm": g * f}
            added["sum_weighted_norm_sq"] = (g * f) ** 2
            if self.shift is not None:
                added["sum_shift"] = g * f * self.shift[layer, token]
        if self.output is not None:
            added |= {"sum_output": self.output[at], "sum_output_sq": self.output[at] ** 2}
        return added

    def _note(self, found, at, layer, token, slot):
        """The largest entry, the others of the token, and its id."""
        if self.norm is not None:
            largest = self.norm if self.output is None else abs(self.output).max(axis=-1)
            found["max_abs"][at] = max(found["max_abs"][at], largest[layer, token, slot])
        if self.together:
            for other in self.expert[layer, token][self.weight[layer, token] != 0]:
                found["pair_count"][(*at, other)] += 1
            add_tokens(found["token_sketch"][at][None], np.zeros(1, int), self.ids[[token]])

    def domain(self, token):
        return int(self.sample[token]) % len(self.domains)

    def save(self, folder):
        folder.mkdir()
        _, n_tokens, top_k = self.expert.shape
        length = np.bincount(self.sample)
        settings = {"norms": self.norm is not None, "collect": self.collect}
        n_next = 0 if self.next is None else self.next.shape[-1]
        about = manifest("activations", 1, settings=settings) | {
            "model": {
                "class": "Synthetic",
                "model_type": "synthetic",
                "layers": list(self.layers),
                "n_experts": self.n_experts,
                "top_k": top_k,
                "n_next": n_next,
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
        ids = pl.DataFrame(token | {"token_id": self.ids}, schema=schema.TOKEN_COLUMNS)
        write(ids, folder / schema.TOKENS)
        words = {"token_id": np.unique(self.ids)}
        words["text"] = [f"w{i}" for i in words["token_id"]]
        write(pl.DataFrame(words, schema=schema.VOCABULARY_COLUMNS), folder / schema.VOCABULARY)
        samples = {
            "sample": range(len(length)),
            "domain": [self.domains[i % len(self.domains)] for i in range(len(length))],
            "n_tokens": length,
            "text_start": [f"text {i}" for i in range(len(length))],
        }
        write(pl.DataFrame(samples, schema=schema.SAMPLE_COLUMNS), folder / schema.SAMPLES)
        columns = schema.layer_columns(top_k, norms=self.norm is not None, n_next=n_next)
        for row, layer in enumerate(self.layers):
            table = token | {"expert": self.expert[row], "weight": self.weight[row]}
            table |= {} if self.norm is None else {"norm": self.norm[row]}
            table |= {} if self.next is None else {"next": self.next[row]}
            write(pl.DataFrame(table, schema=columns), folder / schema.layer_file(layer))
        return load_activations(folder)


def make_recorded(n_tokens=60, n_experts=6, top_k=2, *, norms=True, seed=0):
    """Random routing in which two groups of experts work together and the last is never used."""
    rng = np.random.default_rng(seed)
    used = n_experts - 1
    sample = np.sort(rng.integers(0, 5, n_tokens - 5).tolist() + list(range(5)))
    group = rng.integers(0, 2, n_tokens)
    logits = rng.normal(size=(2, n_tokens, used)) + 2 * (np.arange(used) % 2 == group[:, None])
    ranked = np.argsort(-logits, axis=2)
    expert = ranked[:, :, :top_k]
    chosen = np.exp(np.take_along_axis(logits, expert, axis=2))
    found = Recorded(
        expert=expert.astype(np.uint16),
        weight=(chosen / chosen.sum(axis=2, keepdims=True)).astype(np.float32),
        norm=None,
        sample=sample,
        n_experts=n_experts,
    )
    return _with_all(found, logits, ranked, rng) if norms else found


def _with_all(found, logits, ranked, rng, width=3):
    """The same with all that can be recorded; the last expert is everyone's last choice."""
    n_layers, n_tokens, top_k = found.expert.shape
    output = rng.normal(size=(n_layers, n_tokens, top_k, width))
    last = np.full((n_layers, n_tokens, 1), found.n_experts - 1)
    odds = np.exp(np.concatenate([logits, logits.min(axis=2, keepdims=True) - 1], axis=2))
    return found.changed(
        norm=np.linalg.norm(output, axis=-1).astype(np.float32),
        output=output,
        shift=rng.uniform(0, 1, (n_layers, n_tokens)),
        probability=odds / odds.sum(axis=2, keepdims=True),
        next=np.concatenate([ranked[:, :, top_k:], last], axis=2).astype(np.uint16),
        token_id=rng.integers(0, 40, n_tokens),
        together=True,
    )
