"""Trying a plan in memory, and writing it down as a masked model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from torch import nn

from moecollab.embedded import located
from moecollab.errors import DataError, SettingsError
from moecollab.manifest import new_folder, refuse_existing, write_bytes, write_json
from moecollab.models.gains import Blocked, Factors, Gains
from moecollab.models.keep import Keep, PlanLike, read_keep
from moecollab.models.loading import ModelLike, load_model
from moecollab.models.masked import MASK_FILE, MASKED, Mask, read_masked

Mode: TypeAlias = Literal["reroute", "zero", "renormalise"]


def mask(
    model: ModelLike,
    plan: PlanLike,
    *,
    mode: Mode = "reroute",
    dtype: str = "auto",
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Mask | Blocked:
    """Masks a model's routers so that they choose only kept experts, as the pruned model does.

    Parameters
    ----------
    model : Module, path or hub name
        A loaded model is masked in place until the mask is removed.
    plan : Plan or path
        Kept experts of every MoE layer; layers may keep different numbers.
    mode : {"reroute", "zero", "renormalise"}
        For analyses: "zero" leaves the router as it is and takes the outputs of dropped experts
        away; "renormalise" also scales the weights of a token's other experts to the sum that all
        had. Neither asks for ``top_k`` experts a layer or equal router groups; a token none of
        whose experts are left has a routed output of zero and is counted in ``lost``.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in, if `model` is a path; "auto" is that of the files.
    out : path, optional
        Folder for a masked model: a small file that names the model and the plan, which every
        command takes in place of a model.
    overwrite : bool
        Whether `out` may be replaced.

    Raises
    ------
    PlanError
        When the plan does not fit the model, or the model is masked already.
    """
    model = located(model)
    if mode not in get_args(Mode):
        raise SettingsError("mode", mode, f"one of {', '.join(get_args(Mode))}")
    if out is not None:
        if mode != "reroute":
            raise SettingsError("mode", mode, "'reroute' where a folder is written")
        refuse_existing(Path(out), overwrite=overwrite)
        if not isinstance(model, nn.Module) and Path(model).resolve() == Path(out).resolve():
            raise DataError(f"{out} is the model itself; choose another output")
    keep = read_keep(plan)
    loaded, _ = load_model(model, dtype)
    masked = Mask(loaded, keep) if mode == "reroute" else Blocked(loaded, keep, mode)
    if out is not None:
        _write_masked(Path(out), _base_of(model), keep, overwrite=overwrite)
    return masked


def amplify(model: ModelLike, gain: Factors, *, dtype: str = "auto") -> Gains:
    """Multiplies the outputs of a model's experts, whose routers stay as they are.

    Parameters
    ----------
    model : Module, path or hub name
        A loaded model is changed until the gains are removed.
    gain : mapping or array of shape (n_layers, n_experts)
        Factors by (layer, expert), 1 where nothing is said: 0 takes outputs away, 2 doubles them.
        They multiply those that are on the model already; under a mask, ids are the model's own.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Type the weights are loaded in, if `model` is a path.

    Raises
    ------
    PlanError
        When there is no such expert.
    """
    loaded, _ = load_model(model, dtype)
    return Gains(loaded, gain)


def _base_of(model: ModelLike) -> str:
    """Path or name under which the unmasked model can be loaded again."""
    name = getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else str(model)
    if not name:
        raise DataError(
            "the model was not loaded from a path, so a masked folder cannot name it; "
            "save the model first and mask its folder"
        )
    if not isinstance(model, nn.Module) and read_masked(model) is not None:
        raise DataError(f"{model} is a masked model already; mask its base instead")
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _write_masked(out: Path, base: str, keep: Keep, *, overwrite: bool) -> None:
    with new_folder(out, overwrite=overwrite) as folder:
        write_json(folder / MASK_FILE, {"kind": MASKED, "base": base, "plan": keep.as_json()})
        write_bytes(folder / "README.md", _readme(Path(base).name, keep).encode())


def _readme(base: str, keep: Keep) -> str:
    """What the folder is and which commands take it."""
    left = sum(map(len, keep.keep.values()))
    return (
        f"# {base} under a mask\n\n"
        f"No weights are here: `{MASK_FILE}` names the whole model and the {left} of its "
        f"{keep.n_sites} experts that its routers may choose. What it computes is what the model "
        "pruned by that plan does.\n\n"
        "`moecollab extract` and `moecollab evaluate` take this folder as a model, and so does "
        "`moecollab.load_model`; other loaders do not. To make a smaller checkpoint, give the "
        "whole model and the plan to `moecollab prune`.\n"
    )
