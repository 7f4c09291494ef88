"""The tables of a report: pure functions from its values to markup."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ditc.bundle import Manifest
from ditc.quality.bootstrap import Estimate
from ditc.quality.evaluation import Evaluation, PairedMeasure
from ditc.report.facts import Activations, Drift, Report, Skipped, Speed
from ditc.report.markup import Markup, element
from ditc.report.wording import joined_names, megabytes
from ditc.speed.side_by_side import SideBySide

__all__ = [
    "activation_table",
    "counted",
    "evaluation_tables",
    "file_table",
    "flattened",
    "pairs_table",
    "peer_table",
    "segment_table",
    "step_table",
]

MOST_CHARACTERS = 160  # of a check's value; longer ones are in the JSON
LONG = 40  # characters; a column of longer words may break them
SEGMENTS = "segments/"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)) -> Markup:
    """Return a table that scrolls by itself where too wide; the columns in `text` hold words, the others numbers."""

    def kind(column: int) -> str | None:
        if column not in text:
            return "number"
        return "long" if any(len(row[column]) > LONG for row in rows) else None

    head = element("tr", *(element("th", name, scope="col", class_=kind(i)) for i, name in enumerate(columns)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=kind(i)) for i, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def counted(number: int, noun: str) -> str:
    """Return 1 image, 2 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pairs_table(caption: str, values: Mapping[str, str]) -> Markup:
    """Return names beside what they are."""
    return table(caption, ("name", "value"), list(values.items()), text=(0, 1))


def segment_table(manifest: Manifest, speed: Speed | None) -> Markup:
    """Return calls, bytes and, where known, times of every segment. Other forms share the portable one's weights."""
    rows = []
    for name in manifest.program.calls:
        portable, forms = segment_bytes(manifest, name)
        calls = sum(step.segment == name for step in manifest.program.steps) or 1
        times = _times(name, speed) if speed is not None else ()
        rows.append((name, str(calls), *times, megabytes(portable), megabytes(forms) if forms else ""))
    timed: tuple[str, ...] = ()
    if speed is not None:
        timed = ("median ms", "p90 ms", "share")
        rows.append(("around the engines", "", "", "", f"{speed.outside_share:.1%}", "", ""))
    return table("Segments of one request", ("segment", "calls", *timed, "size", "forms of backends"), rows)


def _times(name: str, speed: Speed) -> tuple[str, ...]:
    times = speed.segments.get(name)
    if times is None:
        return "", "", ""
    return f"{times.latency.median * 1e3:,.3f}", f"{times.latency.p90 * 1e3:,.3f}", f"{times.share:.1%}"


def segment_bytes(manifest: Manifest, name: str) -> tuple[int, int]:
    """Return the bytes of a segment with its weights, and of the graphs that backends take instead."""
    own = {f"{SEGMENTS}{name}.onnx", f"{SEGMENTS}{name}.onnx.data"}
    files = {file: entry.size_bytes for file, entry in manifest.files.items() if file.startswith(f"{SEGMENTS}{name}.")}
    portable = sum(size for file, size in files.items() if file in own)
    return portable, sum(files.values()) - portable


def peer_table(speed: Speed, sides: SideBySide) -> Markup:
    """Return the times of the peers that took turns with the bundle."""
    rows = [
        (
            name,
            f"{peer.step.median * 1e3:,.3f}",
            f"{peer.run.median * 1e3:,.2f}",
            f"{peer.ratio_run:.2f}",
            peer.what,
        )
        for name, peer in sides.peers.items()
    ]
    step, run = sides.bundle.step.median, sides.bundle.run.median
    bundle = ("this bundle", f"{step * 1e3:,.3f}", f"{run * 1e3:,.2f}", "1.00", "")
    columns = ("", "computing step ms", "whole run ms", "times the bundle's", "what it is")
    return table(
        f"In turn, in one run, {counted(speed.batch, 'image')} at a time", columns, [bundle, *rows], text=(0, 4)
    )


def step_table(report: Report) -> Markup:
    """Return every number that the charts over the steps are drawn from."""
    columns: dict[str, list[str]] = {"t": [f"{step.t:g}" for step in report.manifest.program.steps]}
    if isinstance(report.speed, Speed):
        columns["ms"] = [f"{step.seconds * 1e3:.3f}" for step in report.speed.steps]
    if isinstance(report.drift, Drift):
        sides = {"": report.drift.bundle, ", K = 1": report.drift.uncompensated}
        for name, side in sides.items():
            if side is not None:
                columns[f"error{name}"] = [f"{error:.4%}" for error in side.relative_error]
                columns[f"variance{name}"] = [_list(f"{v:+.3%}" for v in row) for row in side.variance_drift]
                columns[f"mean in deviations{name}"] = [_list(f"{v:+.4f}" for v in row) for row in side.mean_drift]
    if report.compensation is not None:
        columns["K"] = [_list(f"{k:.5f}" for k in row) for row in report.compensation]
    rows = [
        (str(step.index), step.segment, *(column[step.index] for column in columns.values()))
        for step in report.manifest.program.steps
    ]
    return table("Every step; drifts and K of each channel", ("step", "segment", *columns), rows, text=(0, 1))


def _list(texts: Iterator[str]) -> str:
    return " ".join(texts)


def activation_table(recorded: Activations) -> Markup:
    """Return the magnitudes of every activation, and the step of the largest."""
    rows = []
    for activation in recorded.activations:
        most = max(activation.largest)
        step = recorded.steps[activation.largest.index(most)]
        limits = f"{min(activation.limits):.3g} to {max(activation.limits):.3g}" if activation.limits else ""
        if activation.limits and min(activation.limits) == max(activation.limits):
            limits = f"{activation.limits[0]:.3g}"
        rows.append(
            (joined_names(activation.layers), f"{min(activation.largest):.3g}", f"{most:.3g}", str(step), limits)
        )
    columns = ("read by", "least maximum", "largest", "at step", "INT8 reaches")
    return table("Largest magnitudes over the steps", columns, rows)


def evaluation_tables(evaluation: Evaluation) -> Iterator[Markup]:
    """Yield pairs and distributions as `ditc evaluate` has them."""
    n = f"{evaluation.n:,} images, seeds {', '.join(map(str, evaluation.seeds))}"
    level = f"{evaluation.bootstrap.level:.0%} intervals"
    pairs = [
        (name, f"{measure.mean:.4f}", _span(measure), f"{measure.worst:.4f}")
        for name, measure in evaluation.measured_pairs.items()
    ]
    yield table(f"Against FP on the same noise: {n}, {level}", ("", "mean", "interval", "worst"), pairs)
    distributions = evaluation.distribution
    if isinstance(distributions, Skipped):
        yield element("p", f"No distribution measures: {distributions.skipped}", class_="note")
        return
    about = f"features {distributions.features.name}, real images: {distributions.real.about}"
    sides = [side.measures for side in (distributions.bundle, distributions.fp, distributions.difference)]
    rows = [
        (
            name.replace("_", " "),
            *(text for side in sides for text in (f"{side[name].value:.4f}", _span(side[name]))),
        )
        for name in sides[0]
    ]
    columns = ("", "bundle", "interval", "FP", "interval", "difference", "interval")
    yield table(f"Against real images: {about}", columns, rows)


def _span(measure: PairedMeasure | Estimate) -> str:
    return f"{measure.low:.4f} to {measure.high:.4f}"


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and short texts of nested JSON; long lists are left to the JSON itself."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
        return
    text = value if isinstance(value, str) else json.dumps(value) if value != [] else "none"
    yield name, text if len(text) <= MOST_CHARACTERS else f"{len(value):,} values, see the JSON"


def file_table(manifest: Manifest) -> Markup:
    """Return every file with its size and digest."""
    rows = [(name, megabytes(entry.size_bytes), entry.sha256) for name, entry in manifest.files.items()]
    return table("Files", ("file", "size", "SHA-256"), rows, text=(0, 2))
