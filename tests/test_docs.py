"""The generated pages are current."""

import pytest

from make_docs import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name):
    assert (DOCS / name).read_text() == PAGES[name](), "run: make docs"


def test_results_hold_their_tables():
    text = (DOCS / "results.md").read_text()
    for criterion in ("caep", "frequency", "gate_sum", "random", "reap"):
        assert text.count(f"| {criterion} | ") == 3, criterion
