"""The embedded model and text, and the script that made them.

``MODEL`` is the folder of a small Mixture-of-Experts model, ``read_questions`` gives real text by
domain, ``run_demo`` runs the whole pipeline on both.
"""

from __future__ import annotations

from moecollab.demo.demo import run_demo
from moecollab.demo.text import read_questions
from moecollab.embedded import MODEL

__all__ = ["MODEL", "read_questions", "run_demo"]
