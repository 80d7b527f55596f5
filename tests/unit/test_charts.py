"""Charts say what the numbers say: read back out of the SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from btx.report.charts import matrix_svg, routing_svg
from btx.report.tokens import token_view
from tests.support.reports import REPORTED

SVG = "{http://www.w3.org/2000/svg}"


def _texts(svg: str) -> list[tuple[str, bool]]:
    """Every text of a picture in its order, and whether it is bold."""
    return [
        (found.text or "", "font-weight: 700" in found.attrib["style"])
        for found in ElementTree.fromstring(svg).iter(f"{SVG}text")
    ]


def test_a_matrix_has_every_number_and_marks_the_best_of_each_column() -> None:
    texts = _texts(matrix_svg(REPORTED))
    cells = [(text, bold) for text, bold in texts if re.fullmatch(r"\d\.\d{3}", text)]
    assert cells == [
        ("3.000", False), ("3.500", True), ("3.250", False),
        ("2.000", True), ("4.000", False), ("3.000", False),
        ("2.250", False), ("3.500", True), ("2.875", True),
    ]  # fmt: skip
    names = [text for text, _ in texts]
    assert {"math", "$law$ & <code>", "mean", "seed", "expert:math", "last"} <= set(names)


def test_colours_say_better_and_worse_than_the_seed() -> None:
    svg = matrix_svg(REPORTED)
    fills = re.findall(r"fill: (#[0-9a-f]{6}); stroke", svg)
    same, better, worse = fills[0], fills[3], fills[4]
    assert fills[:3] == [same] * 3
    assert better == "#78aadc"  # by one bit, as far as anything here
    assert worse not in (same, better)
    assert fills[7] == same


def test_routing_has_the_shares_of_the_exported_model() -> None:
    texts = [text for text, _ in _texts(routing_svg(REPORTED))]
    assert [text for text in texts if text.endswith("%")] == ["75.0%", "25.0%", "50.0%", "50.0%"]
    assert "Routing of the last model" in texts


def test_a_picture_stands_alone_and_is_the_same_each_time() -> None:
    svg = matrix_svg(REPORTED)
    assert svg == matrix_svg(REPORTED)
    assert set(re.findall(r"https?://[^\"' ]*", svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in svg
    ids = re.findall(r'id="([^"]*)"', svg + routing_svg(REPORTED))
    assert len(ids) == len(set(ids))


def test_a_token_has_the_colour_of_the_expert_that_most_layers_chose() -> None:
    rows = [
        {"domain": "m&m", "document": 0, "id": 5, "experts": [1, 1, 0]},
        {"domain": "m&m", "document": 0, "id": 6, "experts": [0, 0, 0]},
    ]
    html = token_view(rows, {5: " <b>", 6: "x"}, ["math", 'co"de'])
    spans = re.findall(r'<span style="background:(#\w+)"(?: title="([^"]*)")?>([^<]*)</span>', html)
    assert [text for _, _, text in spans] == ["math", "co&quot;de", " &lt;b&gt;", "x"]
    assert spans[2][0] == spans[1][0] != spans[3][0] == spans[0][0]
    assert spans[2][1] == "co&quot;de 2, math 1 of 3 layers; 0:co&quot;de 1:co&quot;de 2:math"
    assert "<h3>m&amp;m</h3>" in html
