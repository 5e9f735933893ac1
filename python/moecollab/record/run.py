"""One recording under way: a model, a tokenizer and settings, ready to read samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import manifest
from moecollab.models.context import context_of
from moecollab.models.groups import router_groups
from moecollab.models.loading import ModelLike
from moecollab.models.registry import layout_digest
from moecollab.models.routing import MoeLayer, find_moe_layers, text_config
from moecollab.progress import Bar, say
from moecollab.record.corpus import Corpus
from moecollab.record.reading import Listen, Piece, Reader, cut_batches
from moecollab.record.recorder import Recorder, Routing
from moecollab.record.schema import KIND, NO_EXPERT, VERSION, n_preferences
from moecollab.record.shards import Arrays, ShardStore
from moecollab.record.sums import GROUPS, names_of
from moecollab.record.tallying import Tokens, tally
from moecollab.record.windows import Sample

SLOW = 1.0
"""Seconds from which on writing the sums is put off."""
PATIENCE = 10
"""Least time between two slow writes, in times of what one took."""
_FROM_OUTPUTS = ("shift", "channels")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the recording, besides the model and the text.

    Parameters
    ----------
    tokens : int or None
        Most tokens to record.
    norms : bool
        Whether to record norms of expert outputs.
    collect : tuple of str
        What else to sum.
    context : int
        Tokens that the model reads at once.
    batch_size : int
        Windows that are run together.
    seed : int
        Seed of the choice of documents under a limit.
    folds : int
        Parts of the documents that are summed apart; none if 0.
    """

    tokens: int | None
    norms: bool
    context: int
    batch_size: int
    seed: int
    collect: tuple[str, ...] = ()
    folds: int = 0

    def __post_init__(self) -> None:
        """Checks ranges, and that what is collected can be."""
        names_of(self.collect)
        for group in _FROM_OUTPUTS:
            if group in self.collect and not self.norms:
                raise SettingsError("norms", self.norms, f"true to collect {group!r}")
        for name in ("context", "batch_size", "seed", "folds", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int | None):
                raise SettingsError(name, value, "a whole number")
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "1 or more")
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError("tokens", self.tokens, "1 or more, or None for all")
        if self.folds < 0 or self.folds == 1:
            raise SettingsError("folds", self.folds, "2 or more, or 0 for none")
        if self.seed < 0:
            raise SettingsError("seed", self.seed, "0 or more")

    @property
    def groups(self) -> tuple[str, ...]:
        """All that is summed, in the order of :data:`moecollab.record.sums.GROUPS`."""
        wanted = {"routing", *(["norms"] if self.norms else []), *self.collect}
        return tuple(group for group in GROUPS if group in wanted)


def lengths_of(shards: Sequence[Sequence[Sample]]) -> list[int]:
    """Tokens of each shard."""
    return [sum(len(sample.ids) for sample in shard) for shard in shards]


class Sums:
    """Sums of the first shards of a recording, in memory and on disk.

    They are written before the shard that was added last, so that one that must be made again adds
    nothing. Large sums are not written after every shard: no more than a tenth of the time goes
    there, and a killed run makes the shards since then again.

    Parameters
    ----------
    store : ShardStore
        Where the shards are.
    domains : sequence of str
        Names of all domains.
    n_experts : int
        Routed experts per layer.
    groups : sequence of str
        What is summed.
    """

    def __init__(
        self, store: ShardStore, domains: Sequence[str], n_experts: int, groups: Sequence[str]
    ) -> None:
        self.store = store
        self.domains = domains
        self.n_experts = n_experts
        self.groups = groups
        self.total, self.n_shards = store.sums()
        self._took, self._kept_at = 0.0, 0.0

    def has(self, number: int) -> bool:
        """Whether a shard is done."""
        return number < self.n_shards and self.store.has(number)

    def add(self, number: int, tokens: Tokens, layers: Sequence[Routing]) -> None:
        """Adds a shard unless it was added before; shards come in order."""
        if number < self.n_shards:
            return
        given = (self.domains, tokens, layers, self.n_experts, self.groups)
        self.total, self.n_shards = tally(*given, self.total), number + 1
        if self._took < SLOW or monotonic() - self._kept_at >= PATIENCE * self._took:
            started = monotonic()
            self.store.keep(self.total, self.n_shards)
            self._kept_at = monotonic()
            self._took = self._kept_at - started


class Run:
    """A model with its tokenizer and settings, ready to read samples."""

    def __init__(self, reader: Reader, tokenizer: Any, settings: Settings) -> None:  # noqa: ANN401
        self.reader = reader
        self.model: Any = reader.model
        self.tokenizer = tokenizer
        self.settings = settings
        self.layers: list[MoeLayer] = find_moe_layers(self.model)
        self.n_experts = max(layer.n_experts for layer in self.layers)
        self.top_k = max(layer.top_k for layer in self.layers)
        wanted = "preferences" in settings.collect
        self.n_next = n_preferences(self.n_experts, self.top_k) if wanted else 0
        self.config = text_config(self.model)
        self.context = context_of(self.config, settings.context)

    def tokenize(self, text: str) -> NDArray[np.uint32]:
        """Token ids of a text, with the special tokens that the model expects."""
        return np.asarray(self.tokenizer(text, verbose=False)["input_ids"], dtype=np.uint32)

    def manifest(self, corpus: Corpus, model: ModelLike) -> dict[str, Any]:
        """What is recorded, from what."""
        described = manifest(
            KIND,
            VERSION,
            settings={k: v for k, v in asdict(self.settings).items() if k != "folds" or v}
            | {"context": self.context, "dtype": self._dtype()}
            | {"collect": list(self.settings.collect)},
            inputs={"model": self.reader.digest(), "corpus": corpus.digest},
            seed=self.settings.seed,
        )
        layout = layout_digest(self.layers[0].layout)
        if layout is not None:
            described["inputs"]["layout"] = layout
        given = self.model.name_or_path if isinstance(model, nn.Module) else str(model)
        described["model"] = {
            "class": type(self.model).__name__,
            "model_type": str(self.config.model_type),
            "layers": [layer.layer for layer in self.layers],
            "n_experts": self.n_experts,
            "top_k": self.top_k,
            "path": str(given),
        } | ({"n_next": self.n_next} if self.n_next else {})
        counts = [layer.n_experts for layer in self.layers]
        if len(set(counts)) > 1:
            described["model"]["experts_per_layer"] = counts
        groups = router_groups(self.layers[0])
        if groups is not None:
            described["model"]["router_groups"] = groups.as_json()
        renormalised = getattr(self.config, "norm_topk_prob", None)
        if renormalised is not None:
            described["model"]["norm_topk"] = bool(renormalised)
        return described

    def _dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def check(self, samples: Sequence[Sample]) -> None:
        """Says how many samples are cut; refuses what cannot be recorded, before any work."""
        self._listen(1)(self.layers)  # what a layer does not allow is an error here
        known = getattr(self.config, "vocab_size", None)
        highest = max((int(one.ids.max()) for one in samples if len(one.ids)), default=0)
        if known is not None and highest >= known:
            raise DataError(
                f"the tokenizer makes token id {highest}, but the model knows {known} ids; give "
                "the model's own tokenizer"
            )
        longer = sum(len(one.ids) > self.context for one in samples)
        if longer:
            say(
                f"{longer} of {len(samples)} documents are longer than the context of "
                f"{self.context} tokens: they are read in pieces, each from an empty context"
            )

    def positions(self, samples: Sequence[Sample]) -> int:
        """Most tokens that the model reads at once."""
        return min(max(len(one.ids) for one in samples), self.context) * self.settings.batch_size

    def fill(
        self,
        number: int,
        shards: Sequence[Sequence[Sample]],
        sums: Sums,
        bar: Bar,
    ) -> set[int]:
        """Records a shard, and of those after it what is missing and read together with it."""
        missing = [number]
        for other in range(number + 1, len(shards)):
            more = [*missing, other]
            if sums.has(other):
                continue
            if self.reader.group(lengths_of([shards[one] for one in more])) < len(more):
                break
            missing = more
        tokens = {one: Tokens.of(shards[one], sums.domains) for one in missing}
        columns = {one: self._empty(len(tokens[one].domain)) for one in missing}
        pieces = [
            Piece(batch, columns[one], tokens[one].domain[batch.rows])
            for one in missing
            for batch in cut_batches(shards[one], self.context, self.settings.batch_size)
        ]
        folder = sums.store.folder / "hidden"
        self.reader.record(pieces, self._listen(len(sums.domains)), bar, folder)
        for one in missing:
            merged = columns.pop(one)
            sums.add(one, tokens[one], merged)
            sums.store.write(one, self.arrays(merged))
        return set(missing)

    def arrays(self, merged: list[Routing]) -> Arrays:
        """Arrays of one shard: every layer's columns."""
        arrays: Arrays = {}
        for place, columns in zip(self.layers, merged, strict=True):
            for name in ("expert", "weight", "norm", "next"):
                if getattr(columns, name) is not None:
                    arrays[f"{name}.{place.layer}"] = getattr(columns, name)
        return arrays

    def _listen(self, n_domains: int) -> Listen:
        """Makes recorders of what is asked for."""
        collect = self.settings.collect
        return partial(
            Recorder,
            norms=self.settings.norms,
            channels="channels" in collect,
            shift=self.model if "shift" in collect else None,
            probability="probability" in collect,
            n_next=self.n_next,
            n_domains=n_domains,
            n_experts=self.n_experts,
        )

    def _empty(self, n_tokens: int) -> list[Routing]:
        """Columns of zeros for each layer."""
        shape = (n_tokens, self.top_k)

        def zeros(dtype: type[np.generic] = np.float32) -> NDArray[Any] | None:
            return np.zeros(shape, dtype) if self.settings.norms else None

        def layer() -> Routing:
            chosen, weight = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
            shift = np.zeros(n_tokens, np.float32) if "shift" in self.settings.collect else None
            following = np.full((n_tokens, self.n_next), NO_EXPERT, np.uint16)
            found = Routing(chosen, weight, zeros(), zeros(), zeros(np.int32), shift)
            return replace(found, next=following) if self.n_next else found

        return [layer() for _ in self.layers]

    def vocabulary(self, samples: Sequence[Sample]) -> dict[int, str]:
        """Text of every token id that occurs, by id."""
        occurring = np.unique(np.concatenate([sample.ids for sample in samples]))
        return {int(number): self._piece(int(number)) for number in occurring}

    def _piece(self, number: int) -> str:
        """Text of one token; a piece of a character is shown as the tokenizer names it."""
        text = str(self.tokenizer.decode([number]))
        name = str(self.tokenizer.convert_ids_to_tokens(number))
        if "\ufffd" in text:
            return name
        # Sentence-piece tokenizers drop the space before a first token.
        spaced = name.startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if spaced else text
