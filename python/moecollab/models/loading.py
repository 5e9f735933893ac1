"""The one door to model files: checkpoints, masked models and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from moecollab.errors import DataError, SettingsError
from moecollab.manifest import digest_bytes, digest_json, read_json
from moecollab.models.masked import Mask, read_masked
from moecollab.models.registry import layout_of
from moecollab.models.routing import find_moe_layers

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLED = 4096

ModelLike: TypeAlias = nn.Module | str | PathLike[str]


def load_model(
    model: ModelLike, dtype: str = "auto", *, device: str | None = None, moe: bool = True
) -> tuple[Any, Any]:
    """A model ready to run, and its tokenizer or None.

    Parameters
    ----------
    model : Module, path or hub name
        A loaded model is returned as it is, in its own mode. A masked model's folder is
        loaded and masked.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type of the weights; "auto" is that of the files.
    device : str, optional
        Where to put the weights; CUDA if there is any, else the CPU.
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
    if isinstance(model, nn.Module):
        if moe:
            find_moe_layers(model)
        check_finite(model)
        return model, None
    masked = read_masked(model)
    base = str(model) if masked is None else masked[0]
    loaded = _load_weights(base, dtype, moe=moe)
    check_finite(loaded)
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if masked is not None:
        Mask(loaded, masked[1])
    return loaded.eval(), load_tokenizer(base)


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
        if value.is_meta or not value.is_floating_point():
            continue
        tensor = value.detach().float() if value.dtype.itemsize == 1 else value.detach()
        # A number that is not finite always shows in the sum, which is cheap; a finite sum may
        # overflow, hence the second look.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise DataError(
                f"weight {name} holds NaN or infinite values; the checkpoint is damaged: "
                "download or save it again"
            )


def digest_model(model: nn.Module) -> str:
    """Digest of the configuration and of every tensor: name, shape, dtype and sampled values.

    Up to 4,096 evenly spaced values of each tensor take part, so that the time does not grow with
    the model; a change that misses all of them is not seen.
    """
    config: dict[str, Any] = vars(model)["config"].to_dict() if "config" in vars(model) else {}
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(volatile, None)
    parts = [digest_json(_plain(config))]
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        sampled = b"" if value.is_meta else flat[::step].float().cpu().numpy().tobytes()
        parts.append(f"{name} {tuple(value.shape)} {value.dtype} {digest_bytes(sampled)}")
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


def _load_weights(path: str, dtype: str, *, moe: bool) -> Any:  # noqa: ANN401
    folder = Path(path)
    if not folder.exists() and (path.count("/") > 1 or path.startswith(("/", ".", "~"))):
        raise DataError(f"{path} does not exist; give the folder of a model or its hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(f"{path} holds no config.json; give the folder of a transformers model")
    with _explained(path):
        config = _config(path)
    if moe:
        with torch.device("meta"):
            find_moe_layers(_skeleton(config))
    with _explained(path), quiet():
        model, report = _auto_class(config).from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True
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


def _skeleton(config: Any) -> nn.Module:  # noqa: ANN401
    """The model of a configuration, without weights when made on the meta device."""
    try:
        model: nn.Module = _auto_class(config).from_config(config)
    except ValueError as cause:
        raise DataError(
            f"{type(config).__name__} is not the configuration of a causal language model; "
            "choose a model that generates text"
        ) from cause
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
def _explained(path: str) -> Iterator[None]:
    """Turns errors of the loader into DataError with one sentence."""
    try:
        yield
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
