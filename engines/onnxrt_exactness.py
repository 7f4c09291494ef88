"""Exact integer products in ONNX Runtime's CPU provider: by a switch of the session, where it is needed.

`session.x64quantprecision` acts on x86 without integer dot products: constant weights beyond 7 bits become unsigned,
and products u8 x u8 are added in 32 bits. It is a graph transformer, so it does nothing where a graph is not optimized;
segments with integers always are. Operators that are fused in the file already, it takes as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ditc.engines.integer_form import SEVEN_BITS, Exactness, IntegerForm, find_exactness, weight_bits
from ditc.engines.integer_probes import ROUNDING, Feeds, largest_error
from ditc.errors import InputError

__all__ = ["FORM_ENTRIES", "PROBED", "SLOWER", "probed_exactness", "session_entries"]

SWITCH = "session.x64quantprecision"
# entries of a session's configuration
FORM_ENTRIES: Mapping[IntegerForm, Mapping[str, str]] = {IntegerForm.PLAIN: {}, IntegerForm.SWITCHED: {SWITCH: "1"}}
PROBED = ("onnxrt", "portable")  # kinds of probe graphs: a segment is opened in its own form, and can be in the other
SLOWER = (
    "INT8 products with 8-bit weights would saturate on this CPU, so they run in a form that is exact and slower; "
    "compile with --precision w7a8, which is exact here and faster"
)

OpenSession = Callable[[Path, Mapping[str, str]], Any]


def session_entries(segment: Path, exactness: Callable[[], Exactness]) -> Mapping[str, str]:
    """Return the configuration with which a segment's integer products are exact on this machine.

    `exactness` is asked only where a segment has any. Raises InputError where nothing makes them exact.
    """
    bits = weight_bits(segment)
    if bits is None:
        return FORM_ENTRIES[IntegerForm.PLAIN]
    known = exactness()
    form = known.form(bits)
    if form is None:
        other = "fp32" if known.form(SEVEN_BITS) is None else "w7a8"
        raise InputError(
            f"{segment.name}: products with {bits}-bit weights are not exact in ONNX Runtime on this CPU, with or "
            f"without {SWITCH}; compile with --precision {other}, or run the bundle on another target"
        )
    return FORM_ENTRIES[form]


def probed_exactness(open_session: OpenSession) -> Exactness:
    """Probe which integer products are exact in sessions that are opened as those of segments are."""

    def is_exact(bits: int, form: IntegerForm) -> bool:
        def open_probe(graph: Path) -> Callable[[Feeds], dict[str, Any]]:
            session = open_session(graph, FORM_ENTRIES[form])
            inputs, outputs = ([port.name for port in ports] for ports in (session.get_inputs(), session.get_outputs()))

            def run(feeds: Feeds) -> dict[str, Any]:
                return dict(zip(outputs, session.run(outputs, {name: feeds[name] for name in inputs}), strict=True))

            return run

        return largest_error(open_probe, PROBED, bits) <= ROUNDING["f32"]

    return find_exactness(is_exact, tuple(IntegerForm))
