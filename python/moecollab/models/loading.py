"""The one door to model files: checkpoints, masked models and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from moecollab.embedded import located
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.manifest import digest_bytes, digest_json, read_json
from moecollab.models.masked import Mask, read_masked
from moecollab.models.registry import layout_of
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import router_rows
from moecollab.models.uneven import counts_of, shrink, shrunk

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLED = 4096

ModelLike: TypeAlias = nn.Module | str | PathLike[str]


def load_model(
    model: ModelLike,
    dtype: str = "auto",
    *,
    device: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    offload_folder: str | PathLike[str] | None = None,
    moe: bool = True,
) -> tuple[Any, Any]:
    """A model ready to run, and its tokenizer or None.

    Parameters
    ----------
    model : Module, path or hub name
        A loaded model is returned as it is, in its own mode; of one that ``torch.compile``
        returned, the model inside. A masked model's folder is loaded and masked; a pruned model
        whose layers hold different numbers of experts is built so. "embedded" is the model that the
        package holds, here as in every verb.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type of the weights; "auto" is that of the files.
    device : str, optional
        Where to put the weights; CUDA if there is any, else the CPU.
    device_map : "auto" or mapping of module names to devices, optional
        Spreads the weights over devices, memory and disk, in place of `device`; by accelerate,
        which must be installed.
    offload_folder : path, optional
        Where weights go that `device_map` puts on disk and that differ from their files.
    moe : bool
        Whether a model without known MoE layers is an error, found before weights are read.

    Raises
    ------
    DataError
        When files are missing, damaged or incomplete, or a weight is not finite.
    UnsupportedModelError
        When the model is dense or its family is not known.
    """
    if dtype not in DTYPES:
        raise SettingsError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    model = located(model)
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # what torch.compile was given
        if moe:
            find_moe_layers(model)
        check_finite(model)
        return model, None
    masked = read_masked(model)
    base = str(model) if masked is None else masked[0]
    placed = None if device_map is None else _placement(device_map, device, offload_folder)
    loaded = _load_weights(base, dtype, moe=moe, **(placed or {}))
    check_finite(loaded)
    if placed is None:
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if masked is not None:
        Mask(loaded, masked[1])
    return loaded.eval(), load_tokenizer(base)


def _placement(
    device_map: str | Mapping[str, int | str],
    device: str | None,
    offload_folder: str | PathLike[str] | None,
) -> dict[str, Any]:
    """What the loader of transformers is told about devices."""
    if device is not None:
        raise SettingsError("device", device, "None where device_map is given")
    if find_spec("accelerate") is None:
        raise DataError(
            "device_map needs accelerate, which is not installed; run pip install accelerate, or "
            "leave device_map out"
        )
    placed = device_map if isinstance(device_map, str) else dict(device_map)
    folder = None if offload_folder is None else str(offload_folder)
    return {"device_map": placed, "offload_folder": folder}


def load_tokenizer(path: str) -> Any | None:  # noqa: ANN401 (transformers is untyped)
    """The tokenizer beside a model, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        if (Path(path) / "tokenizer.json").is_file():
            raise DataError(
                f"the tokenizer in {path} is damaged; copy its files there again"
            ) from cause
        return None


def check_finite(model: nn.Module) -> None:
    """Raises DataError if a weight is NaN or infinite, naming it and so its layer."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        check_tensor(name, value)


def check_tensor(name: str, value: torch.Tensor) -> None:
    """Raises DataError if a tensor in memory is of floating point and not finite."""
    if value.is_meta or not value.is_floating_point() or not _plain_numbers(value):
        return
    tensor = value.detach().float() if value.dtype.itemsize == 1 else value.detach()
    # Both ends are NaN if any value is; this reads once and takes no memory.
    if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
        raise DataError(
            f"weight {name} holds NaN or infinite values; the checkpoint is damaged: "
            "download or save it again"
        )


def _plain_numbers(value: torch.Tensor) -> bool:
    """Whether a tensor holds its values as they are; quantisers bring types of their own."""
    return type(value.detach()) is torch.Tensor


def digest_model(model: nn.Module) -> str:
    """Digest of the configuration and of every tensor: name, shape, dtype and sampled values.

    Up to 4,096 evenly spaced values of each tensor take part, so that the time does not grow with
    the model; a change that misses all of them is not seen.
    """
    return digest_parts(model, digest_tensors(model))


def digest_tensors(model: nn.Module) -> dict[str, str]:
    """Digests of all tensors of a model, by name."""
    return {name: digest_tensor(value) for name, value in model.state_dict().items()}


def digest_base(model: nn.Module, tensors: dict[str, str]) -> str:
    """The digest of a model, from those of its tensors, that is the same under every mask.

    Tensors of routers that hold one entry per expert take no part, since a mask cuts them.
    """
    try:
        layers = find_moe_layers(model)
    except UnsupportedModelError:  # a dense model, which nobody masks
        layers = []
    cut = {id(value) for layer in layers for _, _, value in router_rows(layer)}
    names = {name for name, value in model.state_dict(keep_vars=True).items() if id(value) in cut}
    return digest_parts(model, {name: one for name, one in tensors.items() if name not in names})


def digest_tensor(value: torch.Tensor) -> str:
    """Shape, dtype and digest of sampled values of one tensor of a model."""
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    unread = value.is_meta or not _plain_numbers(value)
    sampled = b"" if unread else flat[::step].float().cpu().numpy().tobytes()
    return f"{tuple(value.shape)} {value.dtype} {digest_bytes(sampled)}"


def digest_parts(model: nn.Module, tensors: dict[str, str]) -> str:
    """Digest of a model's configuration and the digests of all its tensors, by name."""
    config: dict[str, Any] = vars(model)["config"].to_dict() if "config" in vars(model) else {}
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(volatile, None)
    parts = [digest_json(_plain(config))]
    parts += [f"{name} {tensor}" for name, tensor in sorted(tensors.items())]
    return digest_bytes("\n".join(parts).encode())


def _plain(value: object) -> object:
    """JSON values of a configuration, whatever objects it holds."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return repr(value)


def open_config(path: str, *, moe: bool) -> Any:  # noqa: ANN401 (transformers is untyped)
    """The configuration of a folder or hub model, whose family is known if `moe` is asked for."""
    folder = Path(path)
    if not folder.exists() and (path.count("/") > 1 or path.startswith(("/", ".", "~"))):
        raise DataError(f"{path} does not exist; give the folder of a model or its hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(f"{path} holds no config.json; give the folder of a transformers model")
    with explained(path):
        config = _config(path)
    if moe:
        find_moe_layers(skeleton(config))
    return config


def _load_weights(path: str, dtype: str, *, moe: bool, **placed: Any) -> Any:  # noqa: ANN401
    config = open_config(path, moe=moe)
    uneven = counts_of(config) is not None
    with explained(path), quiet(), shrunk(type(skeleton(config))) if uneven else nullcontext():
        model, report = _auto_class(config).from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **placed
        )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{path} lacks the weight {missing[0]}{more}; the checkpoint is incomplete: "
            "download or save it again"
        )
    return model


def _config(path: str) -> Any:  # noqa: ANN401 (transformers is untyped)
    """The configuration of a model; one that transformers does not know is our own error."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError):
        file = Path(path) / "config.json"
        found = read_json(file) if file.is_file() else {}
        named = found.get("model_type")
        if isinstance(named, str) and named not in CONFIG_MAPPING:
            layout_of(named, f"the model in {path}")
        if "auto_map" in found:
            raise DataError(
                f"{path} brings its own code, which is not run unasked; load it with "
                "AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True) and pass the model"
            ) from None
        raise


def _auto_class(config: Any) -> Any:  # noqa: ANN401
    """What builds the model of a configuration: with text alone or, if it must be, images."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    seeing = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if seeing and not known else AutoModelForCausalLM


def skeleton(config: Any, **settings: Any) -> Any:  # noqa: ANN401
    """The model of a configuration without weights, on the meta device."""
    try:
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, **settings)
    except ValueError as cause:
        raise DataError(
            f"{type(config).__name__} is not the configuration of a causal language model; "
            "choose a model that generates text"
        ) from cause
    shrink(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bars of transformers away; ours is the one door to progress."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns errors of the loader into DataError with one sentence."""
    try:
        yield
    except DataError:
        raise
    except SafetensorError as cause:
        raise DataError(
            f"the weights in {path} are truncated or damaged ({cause}); download or save them again"
        ) from cause
    except (OSError, ValueError, KeyError, RuntimeError) as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(
            f"{path} cannot be loaded as a model: {reason.rstrip('.')}; give a folder with "
            "config.json and safetensors, or the name of a model that can be reached"
        ) from cause
