"""A report as one page: HTML, CSS and SVG in one text that loads nothing and runs no script."""

from __future__ import annotations

from importlib.resources import files

from ditc.report.facts import Picture, Pictures, Report, Skipped
from ditc.report.figures import activation_figures, calibration_figures, trajectory_figures
from ditc.report.markup import Markup, element, joined
from ditc.report.sentences import (
    integers_sentence,
    key_figures,
    machine_sentence,
    program_sentence,
    proper_name,
    trajectory_sentence,
)
from ditc.report.tables import (
    activation_table,
    counted,
    evaluation_tables,
    file_table,
    flattened,
    pairs_table,
    peer_table,
    segment_table,
    step_table,
)
from ditc.report.wording import megabytes
from ditc.spec import ModelSpec
from ditc.speed.side_by_side import SideBySide

__all__ = ["page_from_report"]

# the page loads nothing from anywhere and runs nothing, and the browser holds it to that
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TINY = 64  # pixels; smaller images are enlarged with their pixels kept square
PLANNED = "footprints"  # what devices will need: planned, not measured, and long


def page_from_report(report: Report, numbers: str) -> str:
    """Return the page; `numbers` is the name of the JSON file beside it."""
    title = f"{report.manifest.model.name}: ditc report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(files("ditc.report").joinpath("report.css").read_text("utf-8"))),
    )
    sections = (
        pictures_section,
        trajectory_section,
        activations_section,
        calibration_section,
        speed_section,
        evaluation_section,
        making_section,
    )
    main = element("main", header(report), *(section(report) for section in sections))
    body = element("body", main, footer(report, numbers))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def header(report: Report) -> Markup:
    """Return model, program and the figures that matter."""
    manifest = report.manifest
    model = manifest.model
    latent = " \N{MULTIPLICATION SIGN} ".join(str(size) for size in model.latent_shape)
    figures = [
        element("div", element("dt", about), element("dd", value, " ", element("small", unit)))
        for value, unit, about in key_figures(report)
    ]
    return element(
        "header",
        element("p", f"ditc report on the bundle {report.bundle}", class_="eyebrow"),
        element("h1", model.name),
        element("p", program_sentence(report), class_="sentence"),
        element(
            "p",
            f"{model.family}, {model.parameters / 1e6:,.2f} M parameters, samples of {latent}, "
            f"{_asked_for(model)}. Measured on {report.place}.{integers_sentence(report)}",
            class_="soft",
        ),
        element("dl", *figures, class_="figures"),
    )


def _asked_for(model: ModelSpec) -> str:
    """Say what an image is asked for with."""
    classes = [] if model.num_classes is None else [f"{model.num_classes:,} classes"]
    others = [condition.name for condition in model.conditions]
    return " and ".join([*classes, *([f"the conditions {', '.join(others)}"] if others else [])]) or "no conditions"


def section(title: str, *content: str) -> Markup:
    return element("section", element("h2", title), *content)


def note(part: Skipped, missing: str) -> Markup:
    """Return why something is not there."""
    return element("p", f"{missing}: {part.skipped}.", class_="note")


def pictures_section(report: Report) -> Markup:
    """Return images of FP and of the bundle on the same noise."""
    pictures = report.pictures
    if isinstance(pictures, Skipped):
        return section("Images", note(pictures, "No images"))
    paired = pictures.pictures[0].exact is not None
    text = "Images of the bundle."
    if paired:
        text = (
            "The same noise three times: by the FP program that computes every step, by the bundle, and the difference "
            f"of the two, {pictures.gain:g} times as large, about grey."
        )
    pairs = [_picture(picture, pictures) for picture in pictures.pictures]
    missing = [note(report.fidelity, "Nothing to compare with")] if isinstance(report.fidelity, Skipped) else []
    return section("Images", element("p", text), *missing, element("ul", *pairs, class_="pictures"))


def _label(picture: Picture) -> str:
    """Return the words under a picture: its prompt, or its class."""
    if picture.prompt is not None:
        return picture.prompt or "the empty prompt"
    return "image" if picture.label is None else f"class {picture.label}"


def _picture(picture: Picture, pictures: Pictures) -> Markup:
    tiny = "tiny" if max(pictures.height, pictures.width) < TINY else None
    label = _label(picture)
    sides = (
        (picture.exact, f"{label} by the FP program"),
        (picture.found, f"{label} by the bundle"),
        (picture.difference, f"difference of the two, {pictures.gain:g} times"),
    )
    images = [
        element(
            "img",
            src=f"data:image/png;base64,{data}",
            alt=alt,
            width=pictures.width,
            height=pictures.height,
            class_=tiny,
        )
        for data, alt in sides
        if data is not None
    ]
    psnr = f"{picture.psnr_db:.1f} dB" if picture.psnr_db is not None else ""
    caption = element("div", element("span", label), element("span", psnr), class_="label")
    return element("li", element("div", *images, class_="row"), caption)


def trajectory_section(report: Report) -> Markup:
    """Return the program and everything that lines up with its steps."""
    notes = [
        note(part, missing)
        for part, missing in ((report.speed, "Not timed"), (report.drift, "No errors"))
        if isinstance(part, Skipped)
    ]
    numbers = element("details", element("summary", "Every number of these charts"), step_table(report))
    lead = element("p", trajectory_sentence(report))
    return section("Step by step", lead, *notes, *trajectory_figures(report), numbers)


def activations_section(report: Report) -> Markup:
    """Return the shares of their ranges that activations fill."""
    recorded = report.activations
    if isinstance(recorded, Skipped):
        return section("Activation ranges", note(recorded, "Not recorded"))
    text = (
        "The largest magnitude that linear layers read at each step, as a share of what INT8 reaches there. Above 100% "
        "it clips; far below, most levels stay unused. A line for each block."
    )
    if not recorded.activations[0].limits:
        text = (
            "The largest magnitude that linear layers read at each step. Scales are those of the tensor as it comes, "
            "so there is no range to keep to; lines are relative to their own largest value."
        )
    scales = f"{proper_name(recorded.method)} ranges, {recorded.binding} scales"
    origin = f"Recorded at {recorded.points} calibration points of the FP program; {scales}."
    return section(
        "Activation ranges",
        element("p", text, " ", element("span", origin, class_="soft")),
        activation_figures(recorded, len(report.manifest.program.steps)),
        element("details", element("summary", "Every activation"), activation_table(recorded)),
    )


def calibration_section(report: Report) -> Markup:
    """Return the points that the ranges were made from."""
    calibration = report.calibration
    if isinstance(calibration, Skipped):
        return section("Calibration set", note(calibration, "None"))
    text = (
        f"{calibration.points} points of {calibration.images} images, chosen by {proper_name(calibration.selector)}. "
    )
    notes = []
    if isinstance(calibration.clusters, Skipped):
        notes = [note(calibration.clusters, "No clusters")]
    else:
        text += (
            "Below, how TAP sees them: points that look alike and lie near in time fall into one cluster. The clusters "
            "are found again among the chosen points, since a bundle keeps no pool."
        )
    return section("Calibration set", element("p", text), *notes, *calibration_figures(calibration))


def speed_section(report: Report) -> Markup:
    """Return sizes and times of every segment, and of what was timed beside the bundle."""
    if isinstance(report.speed, Skipped):
        sizes = segment_table(report.manifest, None)
        return section("Speed and size", note(report.speed, "Not timed"), sizes)
    request, images = report.speed.request, counted(report.speed.batch, "image")
    text = (
        f"A request of {images} takes {request.median * 1e3:,.4g} ms, the median of {request.n}; "
        f"{request.least * 1e3:,.4g} to {request.most * 1e3:,.4g} ms. {machine_sentence(report)}"
    )
    against = report.speed.against
    beside = [peer_table(report.speed, against)] if isinstance(against, SideBySide) else []
    reasons = {} if against is None else against.skipped
    skipped = [note(Skipped(skipped=reason), f"{name} not measured") for name, reason in reasons.items()]
    return section(
        "Speed and size", element("p", text), segment_table(report.manifest, report.speed), *beside, *skipped
    )


def evaluation_section(report: Report) -> Markup:
    """Return measures against FP and real images, where `ditc evaluate` was asked to run too."""
    if report.evaluation is None:
        return Markup()
    return section("Many images", *evaluation_tables(report.evaluation))


def making_section(report: Report) -> Markup:
    """Return settings, versions, checks and files."""
    manifest = report.manifest
    checks = {name: check for name, check in manifest.checks.items() if name != PLANNED}
    parts = {
        "Settings": pairs_table("Settings of the compile", dict(flattened(manifest.settings))),
        "Checks": pairs_table("Measured at the compile", dict(flattened(checks))),
        "Versions": pairs_table("Versions at the compile", manifest.versions),
        "Machine of this report": pairs_table(
            "Machine of this report", dict(flattened(report.machine.model_dump(mode="json")))
        ),
        "Files and digests": file_table(manifest),
    }
    size = megabytes(manifest.size_bytes(reference=False))
    text = f"Compiled by ditc {manifest.ditc_version}: {len(manifest.files)} files, {size} without the FP reference."
    return section(
        "How it was made",
        element("p", text),
        *(element("details", element("summary", name), content) for name, content in parts.items()),
    )


def footer(report: Report, numbers: str) -> Markup:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings)
    origin = f"Made by ditc {report.ditc_version} at {report.made_at} ({settings}). All numbers are in "
    return element("footer", joined((origin, element("code", numbers), ".")))
