"""Kinds of emoji: sixteen that look different, which a classifier can tell apart, out of the package's groups."""

from __future__ import annotations

__all__ = ["KINDS", "kind_of"]

# a subcategory or the beginning of it -> kind; the first that fits
BY_SUBCATEGORY = {
    "cat-face": "smiley",
    "monkey-face": "animal",
    "face-": "smiley",
    "hand": "hand",
    "body-parts": "hand",
    "person-activity": "activity",
    "person-sport": "activity",
    "person-resting": "activity",
    "person-symbol": "sign",
    "person": "person",
    "family": "couple",
    "animal": "animal",
    "plant": "plant",
    "heart": "heart",
    "emotion": "sign",
    "time": "clock",
    "transport-sign": "sign",
    "transport": "vehicle",
    "sky & weather": "weather",
}
BY_CATEGORY = {
    "Flags": "flag",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Symbols": "sign",
    "Objects": "object",
    "Activities": "object",
}
KINDS = tuple(sorted({*BY_SUBCATEGORY.values(), *BY_CATEGORY.values()}))


def kind_of(category: str, subcategory: str) -> str:
    """Return the kind of an emoji of a category and subcategory of emoji.json."""
    fitting = (kind for beginning, kind in BY_SUBCATEGORY.items() if subcategory.startswith(beginning))
    return next(fitting, None) or BY_CATEGORY[category]
