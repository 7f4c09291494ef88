"""HTML and SVG elements as text. What is not markup is escaped, so a name with `<` in it can't become an element."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["Markup", "element", "joined"]

VOID = frozenset({"img", "link", "meta"})  # elements that have neither children nor an end


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element. `class_` is the attribute class, `aria_label` aria-label; an attribute of None is left out."""
    opened = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{opened}>" if name in VOID else f"<{opened}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Markup:
    """Return children one after the other, each escaped unless it is markup."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def _text(value: str | float) -> str:
    """Return a number in as few characters as three decimals take."""
    return value if isinstance(value, str) else f"{value:.3f}".rstrip("0").rstrip(".")
