"""Cuts measured one after the other on one loaded model, each only once, resumably."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecollab.evaluation.evaluation import Evaluation, load_evaluation
from moecollab.evaluation.perplexity import HeldOut, document_losses
from moecollab.evaluation.tasks import Exam, TaskResult
from moecollab.manifest import digest_json, manifest
from moecollab.models.keep import Keep, read_keep
from moecollab.models.masked import Mask

if TYPE_CHECKING:
    from moecollab.pruning.plans import Plan

FULL = "full"
"""Name of the model without a mask."""


def name_of(plan: Plan) -> str:
    """Digest of which experts stay: plans that keep the same ones share it."""
    keep = {str(layer): list(kept) for layer, kept in plan.keep.items()}
    return digest_json({"keep": keep, "n_experts": plan.n_experts})


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A loaded model and everything that it is measured on.

    Parameters
    ----------
    folder : Path
        Where the measurements go, a file per cut.
    model : causal language model
        Loaded; masked in place while a cut is measured.
    text : HeldOut
        Held-out text.
    exam : Exam, optional
        Tasks that the same model answers.
    batch_size : int
        Windows per forward pass.
    """

    folder: Path
    model: Any
    text: HeldOut
    exam: Exam | None
    batch_size: int

    def file(self, name: str) -> Path:
        """Where the measurement of a cut is."""
        return self.folder / f"{name}.json"

    def load(self, name: str) -> Evaluation:
        """A measurement that has been made."""
        return load_evaluation(self.file(name))

    def measure(self, name: str, plan: Plan | None) -> None:
        """Measures a cut, or the full model, unless that has been done."""
        if self.file(name).exists():
            return
        if plan is None:
            found = self._measured(name, None)
        else:
            keep = read_keep(plan)
            with Mask(self.model, keep):
                found = self._measured(name, keep)
        found.save(self.file(name))

    def _measured(self, name: str, keep: Keep | None) -> Evaluation:
        losses = document_losses(self.model, self.text, batch_size=self.batch_size)
        answers: tuple[TaskResult, ...] = () if self.exam is None else self.exam.results()
        return Evaluation(
            name=name,
            model=str(getattr(self.model, "name_or_path", "")),
            documents=losses,
            skipped=self.text.skipped,
            tasks=answers,
            plan=None if keep is None else keep.as_json(),
            about=manifest("evaluation", 1, settings={}, inputs={}, seed=0),
        )
