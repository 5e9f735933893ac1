"""The generated pages are current."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from make_docs import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name):
    assert (DOCS / name).read_text() == PAGES[name](), "run: make docs"


def test_the_blocks_of_the_page_on_models_run_as_they_stand():
    page = (DOCS / "models.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    sizes = {"hidden_size": 8, "moe_intermediate_size": 4}
    config = SimpleNamespace(n_routed_experts=4, num_experts_per_tok=2, **sizes)
    for block in ("SortedMoe", "LoopedMoe"):
        made = names[block](config)
        for value in made.parameters():
            torch.nn.init.normal_(value)
        assert made(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    for name in ("modeling_small_moe", "register_small_moe"):
        file = f"tests/remote/{name}.py"
        assert file in page
        assert (DOCS.parent / file).is_file()


def test_results_hold_both_budgets_of_what_was_compared():
    text = (DOCS / "results.md").read_text()
    n_tables = text.count("### The same share in each layer") * 2
    assert n_tables >= 2
    for criterion in ("caep", "coverage", "easy_ep", "gate_sum", "random", "reap"):
        assert text.count(f"| {criterion} | ") == n_tables, criterion
