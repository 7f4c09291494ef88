"""A JSON document as text to be reviewed: its keys in their order, and the type of every value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# decided by a machine, an installation or a clock: one of all is shown
OPEN = ("versions", "files", "features", "changes", "notes")
SHUT = ("layers",)  # by layer, of which numbers decide whether there is anything to tell
TYPES = {str: "text", int: "whole number", float: "number", bool: "yes or no", type(None): "null"}


def shape_text(document: str) -> str:
    """Return the shape of a document, as indented JSON."""
    return json.dumps(shape_of(json.loads(document)), indent=1) + "\n"


def shape_of(value: Any, name: str = "") -> Any:
    """Return every key with the shape of its value; of a list the different shapes in it."""
    if isinstance(value, dict) and name in SHUT:
        return "..."
    if isinstance(value, dict) and (name in OPEN or (value and all(key.isdigit() for key in value))):
        return {"...": different([shape_of(part) for part in value.values()])}
    if isinstance(value, dict):
        return {key: shape_of(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return ["text"] if name in OPEN and not value else different([shape_of(part) for part in value])
    return TYPES[type(value)]


def different(shapes: Sequence[Any]) -> list[Any]:
    """Return the shapes, each once."""
    return [shape for place, shape in enumerate(shapes) if shape not in shapes[:place]]
