"""Running a model over text and writing down what its routers did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import digest_bytes, manifest, refuse_existing
from moecollab.models.loading import ModelLike, digest_model, load_model
from moecollab.models.routing import MoeLayer, find_moe_layers, text_config
from moecollab.progress import Bar, track
from moecollab.record.activations import Activations, load_activations
from moecollab.record.corpus import Corpus, Source, read_corpus
from moecollab.record.recorder import Recorder, Routing
from moecollab.record.schema import KIND, VERSION
from moecollab.record.shards import Arrays, ShardStore, merge_shards
from moecollab.record.sums import GROUPS, names_of
from moecollab.record.tallies import Tallies
from moecollab.record.tallying import Tokens, tally
from moecollab.record.windows import (
    Sample,
    Window,
    cut_windows,
    group_batches,
    group_shards,
    select_samples,
)

_FIELDS = ("expert", "weight", "norm", "peak", "channel")
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
    """

    tokens: int | None
    norms: bool
    context: int
    batch_size: int
    seed: int
    collect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks ranges, and that what is collected can be."""
        names_of(self.collect)
        for group in _FROM_OUTPUTS:
            if group in self.collect and not self.norms:
                raise SettingsError("norms", self.norms, f"true to collect {group!r}")
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "1 or more")
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError("tokens", self.tokens, "1 or more, or None for all")
        if self.seed < 0:
            raise SettingsError("seed", self.seed, "0 or more")

    @property
    def groups(self) -> tuple[str, ...]:
        """All that is summed, in the order of :data:`moecollab.record.sums.GROUPS`."""
        wanted = {"routing", *(["norms"] if self.norms else []), *self.collect}
        return tuple(group for group in GROUPS if group in wanted)


def extract(  # noqa: PLR0913 (the verb takes what the command takes)
    model: ModelLike,
    corpus: Source,
    *,
    out: str | PathLike[str],
    tokens: int | None = None,
    norms: bool = True,
    collect: str | Sequence[str] = "",
    context: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    overwrite: bool = False,
    tokenizer: Any = None,  # noqa: ANN401 (transformers is untyped)
) -> Activations:
    """Records which experts a model uses on a text, with what weights and effect.

    A run that was killed goes on where it stopped when it is started again with the same model,
    text and settings, and ends with the same bytes; with others it is an error that says what
    changed, unless it may be overwritten. Each document is read on its own; one longer than the
    context is cut into consecutive windows, each read from an empty context, and positions go on
    from window to window.

    Parameters
    ----------
    model : Module, path or hub name
        The model, whole, masked or pruned. A loaded model needs `tokenizer`.
    corpus : path, dataset or iterable
        The text; see :func:`moecollab.record.corpus.read_corpus`.
    out : path
        Folder for the recording.
    tokens : int, optional
        Most tokens to record: a choice by `seed` from every domain in proportion; all if None.
    norms : bool
        Whether to record norms of expert outputs, which some criteria need.
    collect : str or sequence of str
        What else to sum in the same pass, such as "channels,pairs": names in
        :data:`moecollab.record.sums.GROUPS`, or of criteria, which stand for what they need.
    context : int
        Tokens that the model reads at once; at most what the model was made for.
    batch_size : int
        Windows that are run together.
    seed : int
        Seed of the choice of documents under a limit.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in; "auto" is that of the files.
    overwrite : bool
        Whether `out` may be replaced.
    tokenizer : optional
        Tokenizer of a loaded model.

    Raises
    ------
    DataError
        When the text is empty, a file is damaged, or the model's weights or activations are not
        finite.
    UnsupportedModelError
        When the model is dense or its family is not known.
    OutputExistsError
        When `out` is there and `overwrite` is false.
    StaleInputError
        When a run into `out` was stopped that had another model, text or other settings, and
        `overwrite` is false.
    """
    settings = Settings(
        tokens=tokens,
        norms=norms,
        collect=collected(collect),
        context=context,
        batch_size=batch_size,
        seed=seed,
    )
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    text = read_corpus(corpus)
    loaded, found = load_model(model, dtype)
    reader = tokenizer or found
    if reader is None:
        raise DataError("there is no tokenizer for this model; pass tokenizer=")
    run = _Run(loaded, reader, settings)
    samples = select_samples(text, run.tokenize, limit=tokens, seed=seed)
    about = run.manifest(text, model)
    # Another tokenizer or another choice of documents gives other tokens, so other shards.
    about["inputs"]["tokens"] = digest_bytes(b"".join(sample.ids.tobytes() for sample in samples))
    was_training = loaded.training
    loaded.eval()
    try:
        with ShardStore(target, about, overwrite) as store:
            _record(run, samples, store)
    finally:
        loaded.train(was_training)
    return load_activations(target)


def collected(asked: str | Sequence[str]) -> tuple[str, ...]:
    """Groups of sums that names of groups or of criteria ask for, in a fixed order.

    Raises
    ------
    SettingsError
        When a name is neither.
    """
    from moecollab import criteria
    from moecollab.criteria.base import groups_of

    wanted: set[str] = set()
    for name in filter(None, asked.split(",") if isinstance(asked, str) else asked):
        if name in criteria.names():
            wanted |= set(groups_of(criteria.get(name).needs))
        elif name in GROUPS:
            wanted.add(name)
        else:
            known = ", ".join((*GROUPS, *criteria.names()))
            raise SettingsError("collect", name, f"some of {known}")
    return tuple(group for group in GROUPS if group in wanted - {"routing", "norms"})


def _record(run: _Run, samples: Sequence[Sample], store: ShardStore) -> None:
    """Records what is not recorded yet, shard by shard, and puts the result in its place."""
    domains = sorted({sample.document.domain for sample in samples})
    shards = group_shards(samples)
    total: Tallies | None = None
    with track("extract", sum(len(sample.ids) for sample in samples)) as bar:
        for number, shard in enumerate(shards):
            part = [samples[index] for index in shard]
            arrays = store.read(number)
            if arrays is None:
                arrays = run.shard(part, domains, bar)
                store.write(number, arrays)
            else:
                bar.advance(sum(len(sample.ids) for sample in part))
            added = run.tallies(domains, arrays)
            total = added if total is None else total.merge(added)
    if total is None:
        raise DataError("the corpus holds no text; give at least one document that is not blank")
    merge_shards(store, len(shards), samples, total, run.vocabulary(samples))


class _Run:
    """A model with its tokenizer and settings, ready to read samples."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: Settings) -> None:  # noqa: ANN401
        self.model: Any = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.layers: list[MoeLayer] = find_moe_layers(model)
        self.n_experts = max(layer.n_experts for layer in self.layers)
        self.top_k = max(layer.top_k for layer in self.layers)
        self.config = text_config(model)
        longest = getattr(self.config, "max_position_embeddings", None) or settings.context
        self.context = min(settings.context, int(longest))

    def tokenize(self, text: str) -> NDArray[np.uint32]:
        """Token ids of a text, with the special tokens that the model expects."""
        return np.asarray(self.tokenizer(text, verbose=False)["input_ids"], dtype=np.uint32)

    def manifest(self, corpus: Corpus, model: ModelLike) -> dict[str, Any]:
        """What is recorded, from what."""
        described = manifest(
            KIND,
            VERSION,
            settings=asdict(self.settings)
            | {"context": self.context, "dtype": self._dtype()}
            | {"collect": list(self.settings.collect)},
            inputs={"model": digest_model(self.model), "corpus": corpus.digest},
            seed=self.settings.seed,
        )
        given = self.model.name_or_path if isinstance(model, nn.Module) else str(model)
        described["model"] = {
            "class": type(self.model).__name__,
            "model_type": str(self.config.model_type),
            "layers": [layer.layer for layer in self.layers],
            "n_experts": self.n_experts,
            "top_k": self.top_k,
            "path": str(given),
        }
        renormalised = getattr(self.config, "norm_topk_prob", None)
        if renormalised is not None:
            described["model"]["norm_topk"] = bool(renormalised)
        return described

    def _dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def shard(self, samples: Sequence[Sample], domains: Sequence[str], bar: Bar) -> Arrays:
        """Arrays of one shard: every layer's columns and the shard's tallies."""
        windows = cut_windows(samples, self.context)
        first = np.cumsum([0, *(len(window.ids) for window in windows)])
        merged = self._empty(int(first[-1]))
        tokens = Tokens.of(samples, domains)
        with self._recorder(len(domains)) as recorder:
            for batch in group_batches(windows, self.settings.batch_size):
                rows = np.concatenate([np.arange(first[n], first[n + 1]) for n in batch])
                found = self._forward(
                    recorder, [windows[number] for number in batch], tokens.domain[rows]
                )
                merged = [_fill(layer, rows, one) for layer, one in zip(merged, found, strict=True)]
                bar.advance(len(rows))
        sums = tally(domains, tokens, merged, self.n_experts, self.settings.groups)
        arrays: Arrays = {f"tally.{name}": value for name, value in sums.arrays.items()}
        for place, columns in zip(self.layers, merged, strict=True):
            for name in ("expert", "weight", *(["norm"] if self.settings.norms else [])):
                arrays[f"{name}.{place.layer}"] = getattr(columns, name)
        return arrays

    def _recorder(self, n_domains: int) -> Recorder:
        collect = self.settings.collect
        return Recorder(
            self.layers,
            norms=self.settings.norms,
            channels="channels" in collect,
            shift=self.model if "shift" in collect else None,
            n_domains=n_domains,
        )

    def tallies(self, domains: Sequence[str], arrays: Arrays) -> Tallies:
        """The tallies of a finished shard."""
        return Tallies(tuple(domains), {name: arrays[f"tally.{name}"] for name in self._names()})

    def _names(self) -> tuple[str, ...]:
        return names_of(self.settings.groups)

    def _empty(self, n_tokens: int) -> list[Routing]:
        """Columns of zeros for each layer."""
        shape = (n_tokens, self.top_k)

        def zeros(dtype: type[np.generic] = np.float32) -> NDArray[Any] | None:
            return np.zeros(shape, dtype) if self.settings.norms else None

        def layer() -> Routing:
            chosen, weight = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
            shift = np.zeros(n_tokens, np.float32) if "shift" in self.settings.collect else None
            return Routing(chosen, weight, zeros(), zeros(), zeros(np.int32), shift)

        return [layer() for _ in self.layers]

    def _forward(
        self, recorder: Recorder, windows: Sequence[Window], domain: NDArray[np.int64]
    ) -> list[Routing]:
        """Routing of the windows' tokens, one window after the other."""
        longest = max(len(window.ids) for window in windows)
        ids = np.zeros((len(windows), longest), np.int64)
        real = np.zeros((len(windows), longest), np.bool_)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = window.ids
            real[row, : len(window.ids)] = True
        device = self.model.device
        mask = torch.from_numpy(real).to(device)
        domains = np.zeros(real.shape, np.int64)
        domains[real] = domain
        recorder.begin(mask.reshape(-1), torch.from_numpy(domains.reshape(-1)))
        with torch.inference_mode():
            # The base model, because nobody reads the logits here.
            self.model.base_model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=mask.long(),
                use_cache=False,
            )
        return recorder.take(mask.reshape(-1))

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


def _fill(layer: Routing, rows: NDArray[np.int64], routing: Routing) -> Routing:
    """A layer's columns with a batch's rows; fewer slots than columns leave zeros."""
    for name in _FIELDS:
        column, value = getattr(layer, name), getattr(routing, name)
        if column is not None and value is not None:
            column[rows, : value.shape[1]] = value
    if layer.shift is not None and routing.shift is not None:
        layer.shift[rows] = routing.shift
    return replace(layer, sums=routing.sums)
