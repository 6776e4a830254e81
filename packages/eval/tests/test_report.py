import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from vitreg_core.errors import InputError
from vitreg_eval.metrics import Metric
from vitreg_eval.report import Page, Section, apart, comparison, picture, settings_section, write_page


class Reader(HTMLParser):
    """What a browser would load, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def metric(value: float, low: float, high: float) -> Metric:
    return Metric(value=value, n=10, ci95=(low, high))


def test_the_page_shows_everything_and_loads_nothing(tmp_path: Path) -> None:
    results = {"R = 0": {"top1": metric(0.5, 0.4, 0.6)}, "R = 4, planted": {"top1": metric(0.75, 0.7, 0.8)}}
    figure = Figure()
    figure.subplots().plot([0, 1])
    sections = [
        Section("Numbers", ["a < b & c"], comparison(results, {"top1": ("ImageNet", "0.847", "0.848")})),
        Section("Figures", figures=[picture(figure, "a line")]),
        settings_section({"seed": 0}),
    ]
    write_page(Page("Report", ["lead"], sections), tmp_path / "out" / "report.html")
    html = (tmp_path / "out" / "report.html").read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"https?://|@import|url\(", html)
    for text in ("0.5", "0.4 to 0.6 (n=10)", "0.75", "0.848", "ImageNet", "other data", "a < b & c", '"seed": 0'):
        assert text in reader.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_intervals_that_touch_are_not_apart() -> None:
    assert apart(metric(1, 0, 2), metric(4, 3, 5))
    assert apart(metric(4, 3, 5), metric(1, 0, 2))
    assert not apart(metric(1, 0, 3), metric(4, 3, 5))
    assert not apart(Metric(value=1, n=1), metric(4, 3, 5))


def test_an_unwritable_page_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .*; give another --out"):
        write_page(Page("Report", [], []), tmp_path / "file" / "report.html")
