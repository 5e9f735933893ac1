"""Running a model over text and writing down what its routers did."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from moecollab.embedded import located
from moecollab.errors import DataError, SettingsError
from moecollab.manifest import digest_bytes, refuse_existing
from moecollab.models.allocation import give_back
from moecollab.models.loading import ModelLike, load_model, load_tokenizer
from moecollab.models.streamed import StreamedModel
from moecollab.progress import track
from moecollab.record.activations import Activations, load_activations
from moecollab.record.corpus import Source, read_corpus
from moecollab.record.folding import in_folds, out_of_folds
from moecollab.record.layerwise import LayerReader
from moecollab.record.merging import merge_shards
from moecollab.record.reading import Reader, WholeReader
from moecollab.record.run import Run, Settings, Sums, lengths_of
from moecollab.record.shards import ShardStore
from moecollab.record.sums import GROUPS, groups_meant
from moecollab.record.windows import Sample, group_shards, select_samples
from moecollab.settings import names_in


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
    folds: int = 0,
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
        :data:`moecollab.record.sums.GROUPS`, or of criteria, for what they read: "coverage".
    context : int
        Tokens that the model reads at once; at most what the model was made for.
    batch_size : int
        Windows that are run together.
    seed : int
        Seed of the choice of documents under a limit, and of the folds.
    folds : int
        Parts of the documents, ≥ 2, over which all is summed apart as well, so that
        :func:`moecollab.uncertainty` can resample what is summed while recording only; none if 0,
        and at most one for each document.
        Sums take as many times the memory.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in; "auto" is that of the files.
    layer_by_layer : bool
        Whether only one decoder layer of a model on disk is held in memory at a time, for models
        larger than memory. The text goes through one layer after the other; what is recorded is
        the same.
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
    model = located(model)
    settings = Settings(
        tokens=tokens,
        norms=norms,
        collect=collected(collect, norms=norms),
        context=context,
        batch_size=batch_size,
        seed=seed,
        folds=folds,
    )
    target = Path(out)
    if not ShardStore(target, {}).started():
        refuse_existing(target, overwrite=overwrite)
    text = read_corpus(corpus)
    reader, found = _open(model, dtype, settings, hidden_gb if layer_by_layer else None)
    speller = tokenizer or found
    if speller is None:
        raise DataError("there is no tokenizer for this model; pass tokenizer=")
    run = Run(reader, speller, settings)
    samples = select_samples(text, run.tokenize, limit=tokens, seed=seed)
    run.check(samples)
    if folds and len(samples) < 2:
        raise DataError("folds are of documents, of which there is 1; give more text, or folds=0")
    cells = in_folds(samples, folds, seed=seed) if folds else samples
    n_domains = len({sample.document.domain for sample in cells})
    reader.announce(lengths_of(_shards(samples)), run.positions(samples), n_domains)
    with reader:
        about = run.manifest(text, model)
        # Another tokenizer or another choice of documents gives other tokens, so other shards.
        ids = b"".join(sample.ids.tobytes() for sample in samples)
        about["inputs"]["tokens"] = digest_bytes(ids)
        with ShardStore(target, about, overwrite) as store:
            if not store.finished():
                _record(run, samples, cells, store)
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
    reader = LayerReader(streamed, hidden_gb=hidden_gb, groups=settings.groups)
    return reader, load_tokenizer(streamed.path)


def collected(asked: str | Sequence[str], *, norms: bool = True) -> tuple[str, ...]:
    """What is asked for beside routing and norms, in a fixed order.

    Raises
    ------
    SettingsError
        When a name is not known, or norms are asked for here and refused elsewhere.
    """
    wanted = groups_meant(names_in("collect", asked))
    if "norms" in wanted and not norms:
        raise SettingsError("norms", norms, "true to collect 'norms'")
    return tuple(group for group in GROUPS if group in wanted - {"routing", "norms"})


def _record(
    run: Run, samples: Sequence[Sample], cells: Sequence[Sample], store: ShardStore
) -> None:
    """Records what is not recorded yet, shard by shard, and puts the result in its place.

    `cells` are the samples with what they are summed by in the place of domains.
    """
    domains = sorted({cell.document.domain for cell in cells})
    shards = _shards(cells)
    sums = Sums(store, domains, run.n_experts, run.settings.groups)
    done = {number for number in range(len(shards)) if sums.has(number)}
    with track("extract", sum(lengths_of(shards))) as bar:
        if done:
            bar.remark(f"found {len(done)} of {len(shards)} shards")
            bar.advance(sum(lengths_of([shards[number] for number in done])))
        for number in range(len(shards)):
            if number not in done:
                done |= run.fill(number, shards, sums, bar)
    if sums.total is None:
        raise DataError("the corpus holds no text; give at least one document that is not blank")
    give_back()
    by_cell = sums.total if run.settings.folds else None
    by_domain = sums.total if by_cell is None else out_of_folds(by_cell)[0]
    merge_shards(store, len(shards), samples, by_domain, run.vocabulary(samples), by_cell)


def _shards(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each shard."""
    return [[samples[index] for index in shard] for shard in group_shards(samples)]
