"""The demo's text: questions with worked answers that lm-eval's own package ships.

lm-eval holds four or five reasoned examples for each of 57 MMLU subjects. They are read where they
are installed; no text is copied. The first three of a subject are for calibration, the others are
held out.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from moecollab.errors import DataError, MissingInputError

DOMAINS: dict[str, tuple[str, ...]] = {
    "maths": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "formal_logic",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "physics and chemistry": (
        "astronomy",
        "college_chemistry",
        "college_physics",
        "conceptual_physics",
        "electrical_engineering",
        "high_school_chemistry",
        "high_school_physics",
    ),
    "computing": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "biology and medicine": (
        "anatomy",
        "clinical_knowledge",
        "college_biology",
        "college_medicine",
        "high_school_biology",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "business and economics": (
        "business_ethics",
        "econometrics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "management",
        "marketing",
        "professional_accounting",
        "public_relations",
    ),
    "law and politics": (
        "high_school_government_and_politics",
        "international_law",
        "jurisprudence",
        "professional_law",
        "security_studies",
        "us_foreign_policy",
    ),
    "history and geography": (
        "global_facts",
        "high_school_european_history",
        "high_school_geography",
        "high_school_us_history",
        "high_school_world_history",
        "miscellaneous",
        "prehistory",
        "world_religions",
    ),
    "mind and morals": (
        "high_school_psychology",
        "human_sexuality",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "professional_psychology",
        "sociology",
    ),
}
"""MMLU subjects by domain; every subject occurs once."""

_CALIBRATION = 3  # questions of each subject that go to calibration


def read_questions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Calibration and held-out documents, each with `text`, `domain` and `id`.

    Raises
    ------
    MissingInputError
        If the installed lm-eval has no such files.
    """
    calibration: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for domain, subjects in DOMAINS.items():
        for subject in subjects:
            for number, text in enumerate(_questions(subject)):
                document = {"text": text, "domain": domain, "id": f"{subject}/{number}"}
                (calibration if number < _CALIBRATION else held_out).append(document)
    seen = {document["text"] for document in calibration}  # a few stand under two subjects
    return calibration, [document for document in held_out if document["text"] not in seen]


def _questions(subject: str) -> list[str]:
    """Question and worked answer of each example of a subject."""
    import yaml

    path = _folder() / f"mmlu_{subject}.yaml"
    if not path.exists():
        raise MissingInputError(f"{path} is missing; reinstall lm-eval, or pass your own text")
    samples = yaml.safe_load(path.read_text())["fewshot_config"]["samples"]
    if not samples:
        raise DataError(f"{path} holds no examples; reinstall lm-eval, or pass your own text")
    return [f"{sample['question']}\n{sample['target']}" for sample in samples]


def _folder() -> Path:
    """Where lm-eval keeps the worked MMLU examples (found without importing it)."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingInputError("lm-eval is not installed; run: pip install lm-eval")
    return Path(spec.origin).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
