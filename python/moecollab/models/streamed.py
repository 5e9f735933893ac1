"""A model whose weights stay on disk, but for the one decoder layer that runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.models.checkpoint import Checkpoint
from moecollab.models.conversion import Converter, Part, peak_bytes
from moecollab.models.keep import check_keep
from moecollab.models.loading import (
    DTYPES,
    check_tensor,
    digest_base,
    digest_parts,
    digest_tensor,
    explained,
    open_config,
    quiet,
    skeleton,
)
from moecollab.models.masked import layer_masked, read_masked
from moecollab.models.routing import find_moe_layers

_FILLED = "_is_hf_initialized"  # by this mark transformers knows what it need not fill


class StreamedModel:
    """A causal language model of which only what is needed is in memory.

    The embeddings and whatever else is outside the decoder layers stay; of the decoder layers, the
    one in use is loaded and freed again. The output head is never needed to record.

    Parameters
    ----------
    path : path or hub name
        A model in safetensors, or a masked model's folder.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type of the weights; "auto" is that of the files.
    device : str, optional
        Where layers run; CUDA if there is any, else the CPU.

    Raises
    ------
    DataError
        When files are missing or damaged, or lack a weight; found before weights are read.
    UnsupportedModelError
        When the model is dense, its family is not known, or its weights are quantised.
    """

    def __init__(
        self, path: str | PathLike[str], dtype: str = "auto", *, device: str | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise SettingsError("dtype", dtype, f"one of {', '.join(DTYPES)}")
        masked = read_masked(path)
        self.path = str(path) if masked is None else masked[0]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = open_config(self.path, moe=True)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                f"the weights in {path} are quantised; record the model without layer_by_layer"
            )
        with explained(self.path):
            checkpoint = Checkpoint.open(self.path)
            wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
            self.model = skeleton(config, dtype=wanted or checkpoint.dtype).eval()
        self.model.name_or_path = self.path
        self.places = decoder_layers(self.model)
        layers = find_moe_layers(self.model)
        self._moe = {layer.layer: layer for layer in layers}
        self._keep = None if masked is None else masked[1]
        if self._keep is not None:
            check_keep(self._keep, layers)
        self._loader = Converter(self.model, checkpoint, self.device)
        self._tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}))
        parts = self._loader.parts()
        self._absent = self._absences(parts)
        self._sort(parts)
        for module in self.model.modules():  # what is not loaded is not filled either
            vars(module)[_FILLED] = True

    @property
    def base(self) -> Any:  # noqa: ANN401 (transformers is untyped)
        """The model without its output head."""
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, of which at most one has weights."""
        found: nn.ModuleList = self.model.get_submodule(self.places)
        return found

    def _sort(self, parts: Sequence[Part]) -> None:
        """Tells apart what belongs to each layer, to the head, and what stays in memory."""
        self._of_layer: list[list[Part]] = [[] for _ in self.layers]
        self._outside: list[Part] = []
        self._head: list[Part] = []
        # By identity, since a head may be tied to the embeddings.
        tensors = self.model.state_dict(keep_vars=True)
        inside = {id(value) for value in self.base.state_dict(keep_vars=True).values()}
        for part in parts:
            number = re.match(rf"{re.escape(self.places)}\.(\d+)\.", part.targets[0])
            if number is not None:
                self._of_layer[int(number[1])].append(part)
            elif any(id(tensors.get(name)) in inside for name in part.targets):
                self._outside.append(part)
            else:
                self._head.append(part)

    def _absences(self, parts: Sequence[Part]) -> set[str]:
        """Tensors that no file holds and that transformers fills by itself."""
        found = {name for part in parts for name in part.targets}
        for target, source in self._tied.items():
            if found & {target, source}:
                found |= {target, source}
        absent = sorted(set(self.model.state_dict()) - found)
        ignored = [re.compile(one) for one in self.model._keys_to_ignore_on_load_missing or ()]
        missing = [name for name in absent if not any(one.search(name) for one in ignored)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{self.path} lacks the weight {missing[0]}{more}; the checkpoint is incomplete: "
                "download or save it again"
            )
        return set(absent)

    @property
    def outside_bytes(self) -> int:
        """Memory of what stays: embeddings, norms and the like."""
        return sum(part.n_bytes for part in self._outside)

    @property
    def layer_bytes(self) -> int:
        """Most memory that a layer takes, while it is put together too."""
        return max(peak_bytes(parts) for parts in [*self._of_layer, self._head])

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights together."""
        parts = [*self._outside, *self._head, *(part for one in self._of_layer for part in one)]
        return sum(part.n_bytes for part in parts)

    def digest(self, done: Callable[[], None]) -> str:
        """Reads all weights once: checks that they are finite and digests them.

        Must run while :meth:`outside` does.

        Parameters
        ----------
        done : callable
            Called after each layer.

        Returns
        -------
        str
            What :func:`moecollab.models.loading.digest_model` makes of the whole model.
        """
        return digest_parts(self.model, self._digests(done))

    def digest_base(self) -> str:
        """Reads all weights once: what :func:`moecollab.models.loading.digest_base` makes of it."""
        with self.outside():
            return digest_base(self.model, self._digests(lambda: None))

    def _digests(self, done: Callable[[], None]) -> dict[str, str]:
        """Digests of all tensors, by name."""
        found: dict[str, str] = {}
        self._digest(found)
        with self._loaded(self._head, self._owners(self._head)):
            self._digest(found)
        for number in range(len(self.layers)):
            with self.layer(number):
                self._digest(found)
            done()
        return found

    def _digest(self, found: dict[str, str]) -> None:
        """Adds the digests of the tensors that are in memory and not digested yet."""
        for name, value in self.model.state_dict().items():
            if not value.is_meta and name not in found:
                check_tensor(name, value)
                found[name] = digest_tensor(value)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Holds what is outside the decoder layers while the block runs."""
        head = {id(module) for module in self._owners(self._head)}
        modules = [
            module
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self.places}.") and id(module) not in head
        ]
        with self._loaded(self._outside, modules):
            for names in self._tied.items():
                _tie(self.model, names)
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Holds one decoder layer while the block runs."""
        with ExitStack() as stack:
            modules = list(self.layers[number].modules())
            stack.enter_context(self._loaded(self._of_layer[number], modules))
            if self._keep is not None and number in self._moe:
                kept = self._keep.keep[number]
                stack.enter_context(layer_masked(self._moe[number], kept))
            yield

    def _owners(self, parts: Sequence[Part]) -> list[nn.Module]:
        names = {name.rpartition(".")[0] for part in parts for name in part.targets}
        return [self.model.get_submodule(name) for name in sorted(names)]

    @contextmanager
    def _loaded(self, parts: Sequence[Part], modules: Sequence[nn.Module]) -> Iterator[None]:
        """Holds the tensors of some modules, of which `parts` are on disk."""
        try:
            with explained(self.path), quiet():
                self._loader.load(parts)
                self._fill(modules)
            yield
        finally:
            for module in modules:
                _empty(module)

    def _fill(self, modules: Sequence[nn.Module]) -> None:
        """Gives modules what is on no disk, such as rotary frequencies, as transformers does."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for module in modules:
            vars(module)[_FILLED] = False
            for name, value in _own(module):
                unsaved = name in module._non_persistent_buffers_set
                if value.is_meta and (unsaved or f"{names[id(module)]}.{name}" in self._absent):
                    _put(module, name, torch.empty_like(value, device=self.device))
        self.model.initialize_weights()


def decoder_layers(model: nn.Module) -> str:
    """Name of the list of decoder layers, which is the one with the MoE layers."""
    layer = find_moe_layers(model)[0]
    name = re.split(rf"\.{layer.layer}(?:\.|$)", layer.name)[0]
    if not isinstance(model.get_submodule(name), nn.ModuleList):
        raise UnsupportedModelError(
            f"the decoder layers of {type(model).__name__} are no list; record it without "
            "layer_by_layer"
        )
    return name


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module itself."""
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, value) for name, value in found if value is not None]


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a parameter or buffer."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _empty(module: nn.Module) -> None:
    """Frees a module's own tensors; their shapes stay."""
    for name, value in _own(module):
        if not value.is_meta:
            _put(module, name, torch.empty_like(value, device="meta"))


def _tie(model: nn.Module, names: tuple[str, str]) -> None:
    """Makes two tied tensors one, where only one of them is on disk."""
    places = [
        (model.get_submodule(one.rpartition(".")[0]), one.rpartition(".")[2]) for one in names
    ]
    values = [getattr(module, name) for module, name in places]
    for (module, name), value, other in zip(places, values, values[::-1], strict=True):
        if value.is_meta and not other.is_meta:
            module._parameters[name] = other
