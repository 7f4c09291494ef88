"""The page of `ditc report` in a real browser: it fits, it is whole, and nothing goes wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from ditc.bundle import Bundle
from ditc.report.facts import Report
from ditc.report.gathering import report_bundle, write_report
from ditc.report.options import ReportOptions

if TYPE_CHECKING:
    from tests.browser.conftest import Tab

pytestmark = pytest.mark.browser

OPTIONS = ReportOptions(images=14, requests=1, against=("onnxruntime-f32",))
LONG = "a-model-whose-name-is-so-long-that-no-telephone-has-room-for-it-" * 3


@pytest.fixture(scope="module")
def report(bundles: dict[str, Bundle]) -> Report:
    return report_bundle(bundles["cached"].path, OPTIONS)


@pytest.fixture(scope="module")
def pages(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page as it is, with everything unfolded, and with what a name may do to it."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(report, folder / "closed.html")
    text = (folder / "closed.html").read_text()
    (folder / "open.html").write_text(text.replace("<details>", "<details open>"))
    model = report.manifest.model.model_copy(update={"name": LONG})
    named = report.model_copy(update={"manifest": report.manifest.model_copy(update={"model": model}), "bundle": LONG})
    write_report(named, folder / "named.html")
    return {name: folder / f"{name}.html" for name in ("closed", "open", "named")}


@pytest.mark.parametrize("width", [320, 400, 1400])
@pytest.mark.parametrize("name", ["closed", "open", "named"])
def test_a_page_fits_its_window_with_every_picture_and_no_error(
    name: str, width: int, pages: dict[str, Path], tab: Tab, tmp_path: Path
) -> None:
    tab.problems.clear()
    tab.open(pages[name], width)
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.images.length") == 12 * 3
    assert tab.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.problems == []
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


def test_no_text_of_a_chart_leaves_its_page(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["closed"], 400)
    outside = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect())"
    assert tab.value(f"{outside}.length") > 50
    assert tab.value(f"{outside}.filter(box => box.left < 0 || box.right > innerWidth).length") == 0


def test_charts_of_steps_line_up(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["closed"], 1400)
    places = "[...document.querySelectorAll('section > figure > svg.plot')].map(s => s.getBoundingClientRect().left)"
    lefts = tab.value(places)
    assert len(lefts) > 4
    assert max(lefts) == min(lefts)


def test_a_dark_scheme_is_dark_and_print_is_light(pages: dict[str, Path], tab: Tab) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    tab.open(pages["closed"], 400, dark=True)
    dark = tab.value(background)
    tab.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.value(background) == "rgb(255, 255, 255)" != dark
    assert tab.printed().startswith(b"%PDF")
    tab.call("Emulation.setEmulatedMedia", media="")


def test_a_fault_in_a_page_would_be_noticed(pages: dict[str, Path], tab: Tab, tmp_path: Path) -> None:
    tab.problems.clear()
    text = pages["closed"].read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", '<main><script>1</script><img src="https://example.org/x.png">'))
    tab.open(broken, 400)
    assert len(tab.problems) >= 2  # the page's own policy refuses the script and the picture
    assert not tab.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    tab.problems.clear()
