"""Markup: what is not markup is escaped, wherever it stands."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from ditc.report.markup import Markup, element, joined

TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20)


class Reader(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(TEXT, TEXT)
def test_any_text_comes_back_as_it_was_and_makes_no_element(content: str, value: str) -> None:
    reader = Reader()
    reader.feed(element("p", content, title=value))
    reader.close()
    assert reader.text == content
    assert reader.tags == [("p", {"title": value})]


def test_markup_is_not_escaped_again() -> None:
    assert element("p", element("b", "a < b"), " & c") == "<p><b>a &lt; b</b> &amp; c</p>"
    assert joined((Markup("<i>"), "<i>")) == "<i>&lt;i&gt;"


def test_names_of_attributes_are_those_of_html_and_none_is_left_out() -> None:
    rectangle = element("rect", class_="bar", aria_label="x", x=1.50004, y=2.0, width=None)
    assert rectangle == '<rect class="bar" aria-label="x" x="1.5" y="2"></rect>'
    assert element("img", src="data:,") == '<img src="data:,">'
