"""The report in a real browser: it draws, answers to the mouse, and asks nobody for anything."""

import shutil

import pytest

from moecollab.reporting.page import report
from report_run import DOMAINS, N_EXPERTS, write_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]
MAP = "#fig-use"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return report(folder / "report.html", run=write_run(folder / "run"))


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, html):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(120_000)  # a busy machine is no failure
    opened.complaints = []
    opened.on("console", lambda said: opened.complaints.append(said.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda request: opened.complaints.append(f"request {request.url}"))
    opened.on("dialog", lambda dialog: (opened.complaints.append("dialog"), dialog.dismiss()))
    opened.goto(html.as_uri())
    opened.wait_for_selector(f"{MAP} .hm image, {MAP} .hm")
    yield opened
    opened.close()


def until(page, statement):
    """Waits until a statement holds; the page's policy forbids playwright's own way, eval."""
    for _ in range(600):
        if page.evaluate(statement):
            return
        page.wait_for_timeout(50)
    raise AssertionError(statement)


def shown_map(page):
    """Values of the map that is shown."""
    return page.evaluate(
        "Array.from(document.querySelector('#fig-use')._fullData.find(t => t.visible === true && "
        "t.type === 'heatmap').z, row => Array.from(row))"
    )


def hover(page, row, expert):
    """Text of the label over one cell."""
    x, y = page.evaluate(
        """([row, expert]) => {
            const plot = document.querySelector('#fig-use');
            plot.scrollIntoView({block: 'center', behavior: 'instant'});
            const box = plot.getBoundingClientRect(), size = plot._fullLayout;
            return [box.left + size._size.l + size.xaxis.c2p(expert),
                    box.top + size._size.t + size.yaxis.c2p(row)];
        }""",
        [row, expert],
    )
    page.mouse.move(x - 3, y - 2)
    page.mouse.move(x, y, steps=4)
    page.wait_for_selector(f"{MAP} .hoverlayer .hovertext")
    return page.text_content(f"{MAP} .hoverlayer .hovertext")


def test_it_draws_every_figure_without_complaint(page, html):
    drawn = page.evaluate(
        "Array.from(document.querySelectorAll('.plotly-graph-div'), d => !!d._fullLayout)"
    )
    assert len(drawn) >= 6
    assert all(drawn)
    assert [said for said in page.complaints if said != f"request {html.as_uri()}"] == []


def test_hovering_a_cell_names_its_expert(page):
    assert "Layer 2, expert 3" in hover(page, row=1, expert=3)
    assert f"Layer 5, expert {N_EXPERTS - 1}" in hover(page, row=2, expert=N_EXPERTS - 1)


def test_the_menu_changes_the_map(page):
    before = shown_map(page)
    page.click(f"{MAP} .updatemenu-header")
    page.click(f"{MAP} .updatemenu-dropdown-button >> nth=1")
    until(page, "document.querySelector('#fig-use').data[1].visible === true")
    after = shown_map(page)
    assert after != before
    assert DOMAINS[0] in hover(page, row=2, expert=8)


def test_no_text_becomes_markup(page):
    assert page.locator("main b:text-is('law')").count() == 0
    assert (
        page.evaluate("document.querySelectorAll('main script[src], main i:not(.bars i)').length")
        == 0
    )
    assert "dialog" not in page.complaints


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    until(page, "document.querySelector('#fig-cost')._fullLayout.width <= 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
