"""The pages in a real browser without a window: nothing is wider than the screen, nothing is fetched, all is read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from btx.report.charts import matrix_svg, routing_svg
from btx.report.comparison import judged
from btx.report.comparison_page import page as comparison_page
from btx.report.page import page as report_page
from tests.support.reports import COMPARED, REPORTED

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
ASKED = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".wide, figure") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + e.textContent.slice(0, 30));
  const scrolled = [...document.querySelectorAll(".wide, figure")].every(e => e.tabIndex === 0);
  const style = getComputedStyle(document.body);
  document.title = JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth, wide, scrolled,
    fetched: performance.getEntriesByType("resource").length, ink: style.color, paper: style.backgroundColor,
    svg: [...document.querySelectorAll("svg text")].map(e => getComputedStyle(e).fill)});
})</script></body>"""


def looked_at(html: str, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser of a width says of a page."""
    file = folder / "page.html"
    html = html.replace("(prefers-color-scheme: dark)", "all") if dark else html
    file.write_text(html.replace("</body>", ASKED), encoding="utf-8")
    argv = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1200",
        "--virtual-time-budget=2000", f"--user-data-dir={folder}/profile", "--dump-dom", str(file),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    found: dict[str, Any] = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return found


def pages() -> dict[str, str]:
    """Both pages, of results made up."""
    pictures = {"matrix.svg": matrix_svg(REPORTED), "routing.svg": routing_svg(REPORTED)}
    return {
        "report": report_page("A report of <two> models", REPORTED, pictures),
        "comparison": comparison_page(COMPARED | judged(COMPARED)),
    }


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [500, 1400])  # a window without a screen is no narrower than 500
def test_nothing_is_wider_than_the_screen_and_nothing_is_fetched(tmp_path: Path, name: str, width: int) -> None:
    found = looked_at(pages()[name], tmp_path, width=width)
    assert found["scroll"] <= found["inner"]
    assert found["wide"] == []
    assert found["fetched"] == 0
    assert found["scrolled"]  # what scrolls by itself can be scrolled by keyboard


def test_in_the_dark_ink_is_light_in_pictures_too(tmp_path: Path) -> None:
    light, dark = (looked_at(pages()["comparison"], tmp_path, width=1000, dark=dark) for dark in (False, True))
    assert (light["ink"], light["paper"]) == ("rgb(26, 26, 26)", "rgb(255, 255, 255)")
    assert (dark["ink"], dark["paper"]) == ("rgb(230, 230, 227)", "rgb(22, 22, 22)")
    assert light["ink"] in light["svg"]
    assert dark["ink"] in dark["svg"]
    assert light["ink"] not in dark["svg"]
