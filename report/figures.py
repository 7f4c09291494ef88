"""The charts of a report: pure functions from its values to markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from ditc.program import Program
from ditc.report.facts import Activation, Activations, Calibration, Drift, Report, Skipped, Speed
from ditc.report.markup import Markup, element
from ditc.report.svg import Axis, Chart, Dot, Line, axis_for, dots, level, lines, step_map, steps_stacked
from ditc.report.wording import joined_names
from ditc.runtime.closeness import StepDrift

__all__ = [
    "activation_figures",
    "calibration_figures",
    "compensation_figure",
    "drift_figures",
    "kind_of",
    "latency_figure",
    "program_figure",
]

PLOT = 150  # pixels of an ordinary chart
MOST_CHANNELS = 4
PERCENT = 100
Keys = Sequence[tuple[str, str]]  # (class, what it stands for)

KINDS = {"computed": "computed", "float": "computed in floating point", "reused": "reused"}
BUNDLE_KEYS: Keys = (("bundle", "bundle"),)
BOTH_KEYS: Keys = (("bundle", "bundle"), ("bare", "without compensation (K = 1)"))


def figure(title: str, unit: str, keys: Keys, *charts: Markup) -> Markup:
    """Return charts under one title, with what their colours stand for."""
    legend = [element("span", element("i", class_=kind), text, class_="key") for kind, text in keys]
    caption = element("figcaption", element("b", title), element("span", unit, class_="unit"), *legend)
    return element("figure", caption, *charts)


def drawn_as(program: Program, segment: str) -> str:
    """Return the class under which a segment's steps are drawn, one of KINDS."""
    called = program.segment(segment)
    return "float" if called.in_float else "computed" if called.computes else "reused"


def keys_of(kinds: Iterable[str], before: str = "") -> Keys:
    """Return the meaning of the colours of those kinds that there are."""
    drawn = {*kinds}
    return [(f"box {kind}", f"{before}{text}") for kind, text in KINDS.items() if kind in drawn]


def program_figure(program: Program) -> Markup:
    """Draw the program as a map: branches by steps, by whether one computes, and in what."""
    computed = [program.segment(step.segment).compute for step in program.steps]
    kinds = [
        [drawn_as(program, step.segment) if computes else "reused" for computes in row]
        for step, row in zip(program.steps, computed, strict=True)
    ]
    names, count = without_shared_head(program.branches), len(program.branches)
    hints = tuple(
        f"step {step.index}, t {step.t:g}: {step.segment}, {sum(row)} of {count} branches compute"
        for step, row in zip(program.steps, computed, strict=True)
    )
    share = sum(map(sum, computed)) / (count * len(computed))
    chart = Chart(
        title="Program",
        description=f"{count} branches over {len(computed)} steps; {share:.0%} of them compute, the rest is reused",
        height=min(max(14 * count, 42), 336),
        steps=len(computed),
        hints=hints,
    )
    return figure("Program", "branch by step", keys_of(chain.from_iterable(kinds)), step_map(chart, names, kinds))


def latency_figure(speed: Speed, program: Program) -> Markup:
    """Draw the milliseconds of every step, inside the engine and around it; a peer's step as a line across."""
    kinds = {segment.name: drawn_as(program, segment.name) for segment in program.segments}
    peers = speed.peers
    axis = axis_for(
        [*(step.seconds for step in speed.steps), *(peer.step.median for peer in peers.values())],
        scale=1e3,
        unit=" ms",
    )
    bars = [
        (
            (step.engine_seconds, kinds[step.segment]),
            (step.seconds - step.engine_seconds, "outside"),
        )
        for step in speed.steps
    ]
    chart = Chart(
        title="Latency of each step",
        description=f"Medians of {speed.request.n} requests, {min(s.seconds for s in speed.steps) * 1e3:.3g} to "
        f"{max(s.seconds for s in speed.steps) * 1e3:.3g} ms",
        height=PLOT,
        steps=len(bars),
        hints=tuple(
            f"step {step.index}, {step.segment}: {step.seconds * 1e3:.3g} ms, "
            f"{step.engine_seconds * 1e3:.3g} of it in the engine"
            for step in speed.steps
        ),
    )
    marks = [level(chart, axis, peer.step.median, "fp", f"a step of {name}") for name, peer in list(peers.items())[:2]]
    keys = [*keys_of(kinds.values(), "engine, "), ("box", "around the engine")]
    return figure("Latency", "ms per step", keys, steps_stacked(chart, axis, bars, *marks))


def drift_figures(drift: Drift) -> list[Markup]:
    """Draw the error of the samples after each step, and the drift of each channel's variance."""
    sides = [(drift.bundle, "bundle"), *([(drift.uncompensated, "bare")] if drift.uncompensated else [])]
    keys = BOTH_KEYS if drift.uncompensated else BUNDLE_KEYS
    unit = "norm of the difference over norm of FP's"
    errors = _curves("Error of the samples", unit, [(side.relative_error, kind) for side, kind in sides], signed=False)
    return [figure("Error of the samples", unit, keys, errors), _variance_figure(sides, keys)]


def _variance_figure(sides: Sequence[tuple[StepDrift, str]], keys: Keys) -> Markup:
    """Draw a chart for each channel, all on one axis."""
    title, unit = "Drift of the variance", "variance over FP's, less 1"
    channels = _widest_channels([side for side, _ in sides])
    curves = {n: [([row[n] for row in side.variance_drift], kind) for side, kind in sides] for n in channels}
    every = [value for pair in curves.values() for curve, _ in pair for value in curve]
    axis = axis_for(every, unit="%", signed=True, scale=PERCENT)
    if len(sides[0][0].variance_drift[0]) == 1:
        return figure(title, unit, keys, _curves(title, unit, curves[0], signed=True, axis=axis))
    charts = [
        figure(f"channel {n}", "", (), _curves(f"{title}, channel {n}", unit, pair, signed=True, axis=axis))
        for n, pair in curves.items()
    ]
    return figure(title, unit, keys, element("div", *charts, class_="small"))


def _widest_channels(sides: Sequence[StepDrift]) -> list[int]:
    """Return the channels whose variance drifts furthest, in order; all where they are few."""
    count = len(sides[0].variance_drift[0])
    reach = [max(abs(row[channel]) for side in sides for row in side.variance_drift) for channel in range(count)]
    return sorted(sorted(range(count), key=lambda channel: -reach[channel])[:MOST_CHANNELS])


def compensation_figure(k: Sequence[Sequence[float]]) -> Markup:
    """Draw K of every step, a line for each channel."""
    curves = [([row[channel] - 1 for row in k], "bundle" if len(k[0]) == 1 else "thin") for channel in range(len(k[0]))]
    unit = "K of each step, less 1"
    return figure("Compensation", unit, (), _curves("Compensation", unit, curves, signed=True))


def _curves(
    title: str, unit: str, curves: Sequence[tuple[Sequence[float], str]], *, signed: bool, axis: Axis | None = None
) -> Markup:
    """Draw shares over the steps, in percent."""
    sign = "+" if signed else ""
    scale = axis or axis_for(list(chain.from_iterable(c for c, _ in curves)), unit="%", signed=signed, scale=PERCENT)
    named = {"bundle": "bundle", "bare": "without compensation", "thin": "a channel"}

    def at(step: int, decimals: int) -> str:
        return ", ".join(f"{named[kind]} {curve[step]:{sign}.{decimals}%}" for curve, kind in curves)

    steps = len(curves[0][0])
    description = f"{unit}, over {steps} steps; after the last one: {at(-1, 2)}"
    chart = Chart(title, description, PLOT, steps, tuple(f"step {step}: {at(step, 3)}" for step in range(steps)))
    return lines(chart, scale, [Line(curve, kind) for curve, kind in curves])


def activation_figures(recorded: Activations, steps: int) -> Markup:
    """Draw small multiples, one for each kind of layer: how much of its INT8 range every activation reaches."""
    kinds: dict[str, list[Activation]] = {}
    for activation in recorded.activations:
        kinds.setdefault(kind_of(activation.layers), []).append(activation)
    shares = {kind: [_shares(activation) for activation in group] for kind, group in kinds.items()}
    axis = axis_for([1.0, *chain.from_iterable(chain.from_iterable(shares.values()))], unit="%", scale=PERCENT)
    heads = without_shared_head(list(kinds))
    unit = "of its INT8 range" if recorded.activations[0].limits else "of its own largest"
    return element(
        "div",
        *(
            _activation_figure(head, unit, axis, recorded.steps, steps, list(zip(group, shares[kind], strict=True)))
            for head, (kind, group) in zip(heads, kinds.items(), strict=True)
        ),
        class_="small",
    )


def _activation_figure(
    title: str,
    unit: str,
    axis: Axis,
    at: Sequence[int],
    steps: int,
    curves: Sequence[tuple[Activation, list[float]]],
) -> Markup:
    most = max(max(shares) for _, shares in curves)
    chart = Chart(
        title=f"Activations that {title} reads",
        description=f"The largest magnitude at each step, in percent {unit}; {len(curves)} blocks, {most:.0%} at most",
        height=PLOT,
        steps=steps,
    )
    series = [Line(shares, "thin", _activation_text(a), at) for a, shares in curves]
    return figure(title, unit, (), lines(chart, axis, series, level(chart, axis, 1.0, "fp")))


def _shares(activation: Activation) -> list[float]:
    """Return the largest magnitude at each recorded step, as a share of what INT8 reaches there."""
    limits = activation.limits or [max(activation.largest) or 1.0] * len(activation.largest)
    return [largest / limit for largest, limit in zip(activation.largest, limits, strict=True)]


def _activation_text(activation: Activation) -> str:
    span_text = f"{min(activation.largest):.3g} to {max(activation.largest):.3g}"
    reach = sorted({f"{limit:.3g}" for limit in activation.limits}, key=float)
    limit = f", INT8 reaches {' to '.join(reach[:: max(1, len(reach) - 1)])}" if reach else ""
    return f"{joined_names(activation.layers)}: largest magnitude {span_text}{limit}"


def kind_of(layers: Sequence[str]) -> str:
    """Return the path of a layer without the numbers of blocks, which layers of one kind share."""
    return joined_names([".".join(part for part in path.split(".") if not part.isdigit()) for path in layers])


def without_shared_head(names: Sequence[str]) -> list[str]:
    """Return dotted names less the first part, where all have the same and more follows it."""
    heads = {name.split(".", 1)[0] for name in names}
    shared = len(heads) == 1 and all("." in name for name in names)
    return [name.split(".", 1)[1] if shared else name for name in names]


def calibration_figures(calibration: Calibration) -> Iterator[Markup]:
    """Draw the points of each step, and TAP's clusters over the steps."""
    steps = len(calibration.by_step)
    hints = tuple(f"step {step}: {count} points" for step, count in enumerate(calibration.by_step))
    chart = Chart(
        title="Calibration points of each step",
        description=f"{calibration.points} points at {sum(map(bool, calibration.by_step))} of {steps} steps",
        height=90,
        steps=steps,
        hints=hints,
    )
    bars = [[(float(count), "computed")] for count in calibration.by_step]
    axis = axis_for([float(count) for count in calibration.by_step])
    yield figure("Points", "chosen at each step", (), steps_stacked(chart, axis, bars))
    if not isinstance(calibration.clusters, Skipped):
        yield _cluster_figure(calibration, steps)


def _cluster_figure(calibration: Calibration, steps: int) -> Markup:
    assert not isinstance(calibration.clusters, Skipped)
    count = len(calibration.clusters)
    tall = min(14.0, max(3.6, 240 / count))
    chart = Chart(
        title="Clusters of the calibration set",
        description=f"TAP puts {calibration.points} points into {count} clusters; each row is one, early ones above",
        height=count * tall,
        steps=steps,
    )
    rows = [((number + 0.5) * tall, cluster) for number, cluster in enumerate(calibration.clusters)]
    marks = [Dot(step, y, weight) for y, cluster in rows for step, weight in cluster.steps.items()]
    ends = [
        element("text", str(number + 1), x=-8, y=y + 4, class_="tick y")
        for number, (y, _) in enumerate(rows)
        if number in (0, count - 1)
    ]
    unit = "a row each, early ones above; a dot for its points at a step"
    return figure("Clusters", unit, (), dots(chart, marks, *ends))


def trajectory_figures(report: Report) -> Iterator[Markup]:
    """Draw everything over the steps that lines up with the program."""
    yield program_figure(report.manifest.program)
    if isinstance(report.speed, Speed):
        yield latency_figure(report.speed, report.manifest.program)
    if isinstance(report.drift, Drift):
        yield from drift_figures(report.drift)
    if report.compensation is not None:
        yield compensation_figure(report.compensation)
