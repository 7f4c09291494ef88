"""Every name that a user may choose has a row in the table that it stands for, and no row is without a name."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from ditc import choices
from ditc.approximators import APPROXIMATORS
from ditc.calib_data.selection import SELECTORS
from ditc.choices import names_of
from ditc.diagnosis.bisecting import MODES
from ditc.engines.calibrator import CALIBRATORS
from ditc.engines.targets import TARGETS
from ditc.exporter.models import BUILT_IN
from ditc.passes import FOLDING
from ditc.precision import PRECISIONS
from ditc.quality.features import FEATURES
from ditc.quantize.layer_groups import GROUPINGS
from ditc.quantize.midpoints import MIDPOINTS
from ditc.quantize.product_correction import CORRECTIONS
from ditc.quantize.ranges import RANGES
from ditc.quantize.scale_binding import BINDINGS
from ditc.quantize.transforms import TRANSFORMS
from ditc.runtime.compensation import ESTIMATORS
from ditc.runtime.device_executor import GRAPHS
from ditc.runtime.samplers import UPDATES
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS
from ditc.speed.peers import PEERS
from ditc.speed.rates import DEVICES, HERE
from ditc.text_spec import CLEANINGS

TABLES: dict[str, Collection[str]] = {
    "AutoCaches": ("auto", *FOLDING),
    "AutoReuse": ("auto", *APPROXIMATORS),
    "BisectMode": MODES,
    "BuiltIn": BUILT_IN,
    "Caches": FOLDING,
    "Calibration": ("explicit", *CALIBRATORS),
    "Calibrator": CALIBRATORS,
    "Cleaning": CLEANINGS,
    "Compensation": ("auto", "none", *ESTIMATORS),
    "Device": (HERE, *DEVICES),
    "Estimator": ESTIMATORS,
    "Features": FEATURES,
    "GradientRanges": [name for name, row in RANGES.items() if row.needs_gradients],
    "GraphScope": GRAPHS,
    "Grouping": GROUPINGS,
    "Midpoint": MIDPOINTS,
    "Peer": PEERS,
    "Precision": PRECISIONS,
    "ProductCorrection": CORRECTIONS,
    "PublishedDevice": DEVICES,
    "RangeMethod": RANGES,
    "Reuse": APPROXIMATORS,
    "SamplerName": (*UPDATES, *SCHEDULER_SAMPLERS),
    "ScaleBinding": BINDINGS,
    "SchedulerSampler": SCHEDULER_SAMPLERS,
    "Selector": SELECTORS,
    "Smoothing": ("auto", "none", *TRANSFORMS),
    "Target": TARGETS,
    "Transform": TRANSFORMS,
}
# those without a table are read where they are declared: fields of a spec, and settings with two or three ways
TYPES = {
    "BetaSchedule",
    "BisectTarget",
    "FlowTimes",
    "PaddingSide",
    "PoolSteps",
    "Prediction",
    "ProcessPrediction",
    "Sigmas",
    "Spacing",
    "Variance",
}
CHOICES = set(choices.__all__) - {"AUTO", "names_of"}


@pytest.mark.parametrize("name", sorted(CHOICES - TYPES))
def test_the_names_are_those_of_the_table(name: str) -> None:
    assert sorted(names_of(getattr(choices, name))) == sorted(TABLES[name])
