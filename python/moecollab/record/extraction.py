"""Running a model over text and writing down what its routers did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import digest_bytes, manifest, refuse_existing
from moecollab.models.loading import ModelLike, load_model, load_tokenizer
from moecollab.models.routing import MoeLayer, find_moe_layers, text_config
from moecollab.models.streamed import StreamedModel
from moecollab.progress import Bar, say, track
from moecollab.record.activations import Activations, load_activations
from moecollab.record.corpus import Corpus, Source, read_corpus
from moecollab.record.layerwise import LayerReader
from moecollab.record.reading import Listen, Piece, Reader, WholeReader, cut_batches
from moecollab.record.recorder import Recorder, Routing
from moecollab.record.schema import KIND, VERSION
from moecollab.record.shards import Arrays, ShardStore, merge_shards
from moecollab.record.sums import GROUPS, names_of
from moecollab.record.tallies import Tallies
from moecollab.record.tallying import Tokens, tally
from moecollab.record.windows import Sample, group_shards, select_samples

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
    layer_by_layer: bool = False,
    hidden_gb: float = 1.0,
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
        :data:`moecollab.record.sums.GROUPS`; ``moecollab.criteria.collects`` says what criteria
        need.
    context : int
        Tokens that the model reads at once; at most what the model was made for.
    batch_size : int
        Windows that are run together.
    seed : int
        Seed of the choice of documents under a limit.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in; "auto" is that of the files.
    layer_by_layer : bool
        Whether only one decoder layer of a model on disk is held in memory at a time, for models
        larger than memory. The text goes through one layer after the other; what is recorded is
        the same to rounding.
    hidden_gb : float
        With `layer_by_layer`, gigabytes of hidden states and routing that are held in memory. More
        text than fits is read in several rounds over the weights; where not even about 8,192
        tokens fit, their hidden states are written to disk.
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
        When the model is dense or its family is not known, or it does not run layer by layer.
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
    reader, found = _open(model, dtype, settings, hidden_gb if layer_by_layer else None)
    speller = tokenizer or found
    if speller is None:
        raise DataError("there is no tokenizer for this model; pass tokenizer=")
    run = _Run(reader, speller, settings)
    samples = select_samples(text, run.tokenize, limit=tokens, seed=seed)
    run.check(samples)
    reader.announce(_lengths(_shards(samples)), run.positions(samples))
    with reader:
        about = run.manifest(text, model)
        # Another tokenizer or another choice of documents gives other tokens, so other shards.
        ids = b"".join(sample.ids.tobytes() for sample in samples)
        about["inputs"]["tokens"] = digest_bytes(ids)
        with ShardStore(target, about, overwrite) as store:
            _record(run, samples, store)
    return load_activations(target)


def _open(
    model: ModelLike, dtype: str, settings: Settings, hidden_gb: float | None
) -> tuple[Reader, Any]:
    """The model, whole or layer by layer if there are gigabytes for that; its tokenizer or None."""
    if hidden_gb is None:
        loaded, tokenizer = load_model(model, dtype)
        return WholeReader(loaded), tokenizer
    if isinstance(model, nn.Module):
        raise SettingsError(
            "layer_by_layer", True, "False for a model that is loaded; give its folder instead"
        )
    streamed = StreamedModel(model, dtype)
    reader = LayerReader(streamed, hidden_gb=hidden_gb, channels="channels" in settings.collect)
    return reader, load_tokenizer(streamed.path)


def collected(asked: str | Sequence[str]) -> tuple[str, ...]:
    """What is asked for beside routing and norms, in a fixed order.

    Raises
    ------
    SettingsError
        When a name is not known.
    """
    names = asked.split(",") if isinstance(asked, str) else asked
    wanted = {name for name in names if name}
    names_of(wanted)
    return tuple(group for group in GROUPS if group in wanted - {"routing", "norms"})


def _record(run: _Run, samples: Sequence[Sample], store: ShardStore) -> None:
    """Records what is not recorded yet, shard by shard, and puts the result in its place."""
    domains = sorted({sample.document.domain for sample in samples})
    shards = _shards(samples)
    total: Tallies | None = None
    new: set[int] = set()
    with track("extract", sum(len(sample.ids) for sample in samples)) as bar:
        for number, part in enumerate(shards):
            arrays = store.read(number)
            if arrays is None:
                new |= run.fill(number, shards, domains, store, bar)
                arrays = store.read_whole(number)
            elif number not in new:
                bar.advance(sum(len(sample.ids) for sample in part))
            added = run.tallies(domains, arrays)
            total = added if total is None else total.merge(added)
    if total is None:
        raise DataError("the corpus holds no text; give at least one document that is not blank")
    merge_shards(store, len(shards), samples, total, run.vocabulary(samples))


def _shards(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each shard."""
    return [[samples[index] for index in shard] for shard in group_shards(samples)]


def _lengths(shards: Sequence[Sequence[Sample]]) -> list[int]:
    """Tokens of each shard."""
    return [sum(len(sample.ids) for sample in shard) for shard in shards]


class _Run:
    """A model with its tokenizer and settings, ready to read samples."""

    def __init__(self, reader: Reader, tokenizer: Any, settings: Settings) -> None:  # noqa: ANN401
        self.reader = reader
        self.model: Any = reader.model
        self.tokenizer = tokenizer
        self.settings = settings
        self.layers: list[MoeLayer] = find_moe_layers(self.model)
        self.n_experts = max(layer.n_experts for layer in self.layers)
        self.top_k = max(layer.top_k for layer in self.layers)
        self.config = text_config(self.model)
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
            inputs={"model": self.reader.digest(), "corpus": corpus.digest},
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

    def check(self, samples: Sequence[Sample]) -> None:
        """Says how many samples are cut; token ids that the model does not know are refused."""
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
        domains: Sequence[str],
        store: ShardStore,
        bar: Bar,
    ) -> set[int]:
        """Records a shard, and of those after it what is missing and read together with it."""
        missing = [number]
        for other in range(number + 1, len(shards)):
            if not store.has(other):
                missing.append(other)
        missing = missing[: self.reader.group(_lengths([shards[one] for one in missing]))]
        tokens = {one: Tokens.of(shards[one], domains) for one in missing}
        columns = {one: self._empty(len(tokens[one].domain)) for one in missing}
        pieces = [
            Piece(batch, columns[one], tokens[one].domain[batch.rows])
            for one in missing
            for batch in cut_batches(shards[one], self.context, self.settings.batch_size)
        ]
        self.reader.record(pieces, self._listen(len(domains)), bar, store.folder / "hidden")
        for one in missing:
            store.write(one, self.arrays(tokens[one], domains, columns.pop(one)))
        return set(missing)

    def arrays(self, tokens: Tokens, domains: Sequence[str], merged: list[Routing]) -> Arrays:
        """Arrays of one shard: every layer's columns and the shard's tallies."""
        sums = tally(domains, tokens, merged, self.n_experts, self.settings.groups)
        arrays: Arrays = {f"tally.{name}": value for name, value in sums.arrays.items()}
        for place, columns in zip(self.layers, merged, strict=True):
            for name in ("expert", "weight", *(["norm"] if self.settings.norms else [])):
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
            n_domains=n_domains,
            n_experts=self.n_experts,
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
