"""The prompts that a compile runs on where nobody gives others: a list that comes with ditc."""

from __future__ import annotations

from importlib.resources import files

from ditc.prompt_lists import lines_of

__all__ = ["SHIPPED", "shipped_prompts"]

SHIPPED = "the shipped list"  # as people read where prompts are from


def shipped_prompts() -> tuple[str, ...]:
    """Return them: subjects, styles, counts, lengths and languages mixed, so that the first ones alone are varied."""
    return lines_of((files("ditc.exporter") / "prompts.txt").read_bytes())
