"""The generated pages are current."""

import pytest

from make_docs import DOCS, PAGES
from moecollab.criteria import names


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name):
    assert (DOCS / name).read_text() == PAGES[name](), "run: make docs"


SAME_PLANS = {"esft_token", "esft_gate"}
"""Criteria that rank as another does (tests/criteria/test_routing.py), so cost the same."""


def test_results_hold_their_tables():
    text = (DOCS / "results.md").read_text()
    for criterion in set(names()) - SAME_PLANS:
        assert text.count(f"| {criterion} | ") == 3, criterion
