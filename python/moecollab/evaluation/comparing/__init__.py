"""Criteria against each other: every cut measured on held-out text, with intervals and ranks."""
