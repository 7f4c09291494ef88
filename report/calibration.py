"""The part of a report about calibration: the chosen points as TAP clusters them, and what activations reach there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.calib_data.pool import Pool
from ditc.calibset import CalibSet
from ditc.errors import DitcError
from ditc.precision import quantized
from ditc.progress import Progress
from ditc.quantize.rotation import Rotation
from ditc.report.facts import Activation, Activations, Calibration, Cluster, Skipped

__all__ = ["activations_of", "calibration_of"]

POINTS_OF_A_STEP = 4  # at which activations are recorded


def calibration_of(bundle: Bundle) -> Calibration | Skipped:
    """Return the calibration set of a bundle."""
    path = bundle.path / "calib" / "calib.npz"
    if not path.is_file():
        return Skipped(skipped=_no_calibration(bundle))
    calib = CalibSet.load(path)
    counts = np.bincount(calib.step, minlength=len(bundle.manifest.program.steps))
    return Calibration(
        selector=bundle.manifest.asked.select or "tap",
        points=len(calib),
        images=len(np.unique(calib.sample)),
        digest=calib.digest,
        by_step=tuple(counts.tolist()),
        by_class=dict(sorted(Counter(calib.label.tolist()).items())),
        clusters=_clusters(bundle, calib),
    )


def _no_calibration(bundle: Bundle) -> str:
    precision = bundle.manifest.precision
    if not quantized(precision):
        return f"{precision} calibrates nothing"
    return "calib/ was left out of this bundle; copy that folder too"


def _clusters(bundle: Bundle, calib: CalibSet) -> tuple[Cluster, ...] | Skipped:
    """Return TAP's clusters of the chosen points, early ones first; computed again, since a bundle keeps no pool."""
    try:
        labels = _tap_labels(bundle, calib)
    except ModuleNotFoundError as e:
        return Skipped(skipped=f"clustering needs {e.name}; install it with: pip install 'ditc[export]'")
    except DitcError as e:
        return Skipped(skipped=str(e))
    clusters = [
        Cluster(steps=dict(sorted(Counter(calib.step[labels == label].tolist()).items())))
        for label in np.unique(labels)
    ]
    return tuple(sorted(clusters, key=lambda cluster: (cluster.middle, cluster.size)))


def _tap_labels(bundle: Bundle, calib: CalibSet) -> NDArray[np.int64]:
    from ditc.calib_data.selection import SelectionOptions, tap_clusters
    from ditc.compiler.options import CompileOptions

    known = CompileOptions.model_fields.keys()
    stated = {name: value for name, value in bundle.manifest.settings.items() if name in known and name != "sampler"}
    chosen = CompileOptions.model_validate(stated).selection()
    options = SelectionOptions(
        points=len(calib), clusters=min(chosen.cluster_count, len(calib)), seed=chosen.seed, tap=chosen.tap
    )
    return tap_clusters(Pool(calib.x, calib.sample, calib.step, calib.t, calib.label), options)


def activations_of(bundle: Bundle, progress: Progress) -> Activations | Skipped:
    """Run the FP program at some calibration points of every step, and hold what its layers read to their scales."""
    if not quantized(bundle.manifest.precision):
        return Skipped(skipped=f"{bundle.manifest.precision} quantizes no activation, so none has a range to keep to")
    if not bundle.has_reference or not (bundle.path / "calib" / "calib.npz").is_file():
        return Skipped(skipped="activations are recorded with reference/ and calib/, and one of them was left out")
    try:
        return _recorded(bundle, progress)
    except ModuleNotFoundError as e:
        return Skipped(skipped=f"recording them needs {e.name}; install it with: pip install 'ditc[export]'")


def _recorded(bundle: Bundle, progress: Progress) -> Activations:
    from ditc.compiler.calibrating import chosen_points, scales_of

    steps = np.unique(CalibSet.load(bundle.path / "calib" / "calib.npz").step)
    calib, table = chosen_points(bundle, POINTS_OF_A_STEP * len(steps)), scales_of(bundle)
    recorded = np.unique(calib.step).tolist()
    with TemporaryDirectory(prefix="ditc-report-") as folder:
        readers, run = _probe(bundle, table.rotation, Path(folder).resolve())
        largest = []
        for done, step in enumerate(recorded):
            progress("activations", done, len(recorded))
            largest.append(run(calib.take(np.flatnonzero(calib.step == step))))
    progress("activations", len(recorded), len(recorded))
    return Activations(
        binding=table.binding,
        method=table.method,
        points=len(calib),
        steps=tuple(recorded),
        activations=tuple(
            Activation(
                layers=layers,
                largest=tuple(of_step[name] for of_step in largest),
                limits=tuple(table.reach(layers[0], step) for step in recorded) if table.scales else (),
            )
            for name, layers in readers.items()
        ),
    )


def _probe(
    bundle: Bundle, rotation: Rotation | None, folder: Path
) -> tuple[Mapping[str, tuple[str, ...]], Callable[[CalibSet], dict[str, float]]]:
    """Return (layers that read each activation, what gives the largest magnitude of each at some points of one step).

    The FP segment is cut down to what linear layers read, in a folder of its own.
    """
    from ditc.compiler.calibrating import calibration_feeds
    from ditc.compiler.point_conditions import PointConditions
    from ditc.engines.backend import runnable_path
    from ditc.engines.onnxrt import OnnxRuntimeBackend
    from ditc.exporter.onnx_files import load_graph, save_graph
    from ditc.program import CONDITION
    from ditc.quantize.rotated_graphs import rotate
    from ditc.quantize.scales import activation_probe

    model, backend = load_graph(bundle.reference_path("full")), OnnxRuntimeBackend()
    if rotation is not None:
        rotate(model, rotation)
    readers = activation_probe(model)
    save_graph(model, folder / "probe.onnx")
    session = backend.session(folder / "probe.onnx")
    condition = backend.session(runnable_path(bundle.segment_path(CONDITION), backend.name))
    ports, names = {port.name for port in session.get_inputs()}, list(readers)
    images = PointConditions.of_bundle(bundle)

    def run(points: CalibSet) -> dict[str, float]:
        largest = dict.fromkeys(names, 0.0)
        for feed in calibration_feeds(condition, points, images, POINTS_OF_A_STEP):
            arrays = session.run(names, {name: array for name, array in feed.items() if name in ports})
            largest = {name: max(largest[name], float(np.abs(x).max())) for name, x in zip(names, arrays, strict=True)}
        return largest

    return readers, run
