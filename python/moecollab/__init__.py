"""Which experts of a Mixture-of-Experts model work together, and which it can do without.

``extract`` records what the routers do on your text, ``import_routing`` reads what a serving
engine recorded, ``HSDL().fit`` finds groups of experts that work together across layers, ``mine``
counts every pair and triplet, ``score`` and ``plan`` decide which experts to drop, ``mask`` tries a
plan in memory, ``prune`` writes a smaller checkpoint, ``evaluate`` says what it cost, ``compare``
holds criteria against each other and ``report`` shows it all on one page. Each is also a command:
``moecollab --help``.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

__version__ = metadata.version("moecollab")

if TYPE_CHECKING:
    from moecollab.criteria.scores import Scores, load_scores
    from moecollab.criteria.scoring import score
    from moecollab.evaluation.comparing.comparison import Comparison, load_comparison
    from moecollab.evaluation.comparing.running import compare
    from moecollab.evaluation.evaluation import Evaluation, evaluate, load_evaluation
    from moecollab.evaluation.repairing.repairing import Repair, repair
    from moecollab.models.loading import load_model
    from moecollab.models.masking import amplify, mask
    from moecollab.patterns.coverage import coverage
    from moecollab.patterns.dictionary import HSDL, Collaboration, load_collaboration
    from moecollab.patterns.mined import Mined, load_mined
    from moecollab.patterns.mining import mine
    from moecollab.patterns.stability import match_atoms, robustness, stability
    from moecollab.pruning.blending import blend
    from moecollab.pruning.exporting import export_ranking, load_ranking
    from moecollab.pruning.iteration import iterate
    from moecollab.pruning.merging.merging import merge
    from moecollab.pruning.planning import plan
    from moecollab.pruning.plans import Plan, load_plan
    from moecollab.pruning.pruning import prune
    from moecollab.pruning.rankings import agreement
    from moecollab.pruning.resampling import uncertainty
    from moecollab.record.activations import Activations, load_activations
    from moecollab.record.counts import RoutingCounts, load_counts
    from moecollab.record.extraction import extract
    from moecollab.record.imports.importing import import_routing
    from moecollab.reporting.comparison_page import comparison_page
    from moecollab.reporting.figures.comparisons import comparison_figure
    from moecollab.reporting.figures.sweeps import sweep_figure
    from moecollab.reporting.page import report

_HOME = {
    "Activations": "record.activations",
    "Collaboration": "patterns.dictionary",
    "Comparison": "evaluation.comparing.comparison",
    "Evaluation": "evaluation.evaluation",
    "HSDL": "patterns.dictionary",
    "Mined": "patterns.mined",
    "Plan": "pruning.plans",
    "Repair": "evaluation.repairing.repairing",
    "RoutingCounts": "record.counts",
    "Scores": "criteria.scores",
    "compare": "evaluation.comparing.running",
    "comparison_page": "reporting.comparison_page",
    "comparison_figure": "reporting.figures.comparisons",
    "agreement": "pruning.rankings",
    "amplify": "models.masking",
    "blend": "pruning.blending",
    "coverage": "patterns.coverage",
    "evaluate": "evaluation.evaluation",
    "export_ranking": "pruning.exporting",
    "extract": "record.extraction",
    "import_routing": "record.imports.importing",
    "iterate": "pruning.iteration",
    "load_activations": "record.activations",
    "load_collaboration": "patterns.dictionary",
    "load_comparison": "evaluation.comparing.comparison",
    "load_counts": "record.counts",
    "load_evaluation": "evaluation.evaluation",
    "load_mined": "patterns.mined",
    "load_model": "models.loading",
    "load_plan": "pruning.plans",
    "load_ranking": "pruning.exporting",
    "load_scores": "criteria.scores",
    "mask": "models.masking",
    "match_atoms": "patterns.stability",
    "merge": "pruning.merging.merging",
    "mine": "patterns.mining",
    "plan": "pruning.planning",
    "prune": "pruning.pruning",
    "repair": "evaluation.repairing.repairing",
    "report": "reporting.page",
    "robustness": "patterns.stability",
    "score": "criteria.scoring",
    "stability": "patterns.stability",
    "sweep_figure": "reporting.figures.sweeps",
    "uncertainty": "pruning.resampling",
}

__all__ = [
    "HSDL",
    "Activations",
    "Collaboration",
    "Comparison",
    "Evaluation",
    "Mined",
    "Plan",
    "Repair",
    "RoutingCounts",
    "Scores",
    "agreement",
    "amplify",
    "blend",
    "compare",
    "comparison_figure",
    "comparison_page",
    "coverage",
    "evaluate",
    "export_ranking",
    "extract",
    "import_routing",
    "iterate",
    "load_activations",
    "load_collaboration",
    "load_comparison",
    "load_counts",
    "load_evaluation",
    "load_mined",
    "load_model",
    "load_plan",
    "load_ranking",
    "load_scores",
    "mask",
    "match_atoms",
    "merge",
    "mine",
    "plan",
    "prune",
    "repair",
    "report",
    "robustness",
    "score",
    "stability",
    "sweep_figure",
    "uncertainty",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public object)
    """Imports a public name on first use."""
    if name == "criteria":  # so that mc.criteria.register is there without another import
        return import_module("moecollab.criteria")
    if name not in _HOME:
        raise AttributeError(f"module 'moecollab' has no attribute {name!r}")
    if name == "extract":  # criteria must be there to be named in `collect`
        import_module("moecollab.criteria")
    value = getattr(import_module(f"moecollab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
