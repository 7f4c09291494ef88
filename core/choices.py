"""The names that a user may choose from, each list once: tables elsewhere have a row for every one of them.

They stand here, away from what they name, so that a command line and its help load nothing heavy. That no row is
missing and none is left over is a test (`tests/core/test_choices.py`); names of a table that loads nothing itself are
taken from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from ditc.approximators import APPROXIMATORS
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS

__all__ = [
    "AUTO",
    "AutoCaches",
    "AutoReuse",
    "BetaSchedule",
    "BisectMode",
    "BisectTarget",
    "BuiltIn",
    "Caches",
    "Calibration",
    "Calibrator",
    "Cleaning",
    "Compensation",
    "Device",
    "Estimator",
    "Features",
    "FlowTimes",
    "GradientRanges",
    "GraphScope",
    "Grouping",
    "Midpoint",
    "PaddingSide",
    "Peer",
    "PoolSteps",
    "Precision",
    "Prediction",
    "ProcessPrediction",
    "ProductCorrection",
    "PublishedDevice",
    "RangeMethod",
    "Reuse",
    "SamplerName",
    "ScaleBinding",
    "SchedulerSampler",
    "Selector",
    "Sigmas",
    "Smoothing",
    "Spacing",
    "Target",
    "Transform",
    "Variance",
    "names_of",
]

AUTO = "auto"  # for a setting that is decided when the model and the schedule are known

# of a model and its sampler
Prediction = Literal["epsilon", "v", "sample"]  # of a process over betas, as a checkpoint is said to have it
ProcessPrediction = Literal[Prediction, "flow"]
FlowTimes = Literal["0:1", "1:0", "0:1000", "1000:0"]  # of noise and of data, as the network is given them
BetaSchedule = Literal["linear", "scaled-linear", "squared-cosine"]
if TYPE_CHECKING:
    SchedulerSampler = str
    SamplerName = str
else:
    SchedulerSampler = Literal[tuple(SCHEDULER_SAMPLERS)]  # read off a scheduler of diffusers
    SamplerName = Literal["ddim", "ddpm", SchedulerSampler]
Spacing = Literal["linspace", "leading", "trailing"]
Sigmas = Literal["karras", "exponential", "beta"]
Variance = Literal["learned", "fixed-small", "fixed-large"]

# of a text encoder
Cleaning = Literal["none", "lower-strip"]
PaddingSide = Literal["right", "left"]

# of a cache
Caches = Literal["branches", "sums"]
AutoCaches = Literal["auto", Caches]
if TYPE_CHECKING:
    Reuse = str
    AutoReuse = str
else:  # the names are the table's, so that a row of it is one place
    Reuse = Literal[tuple(APPROXIMATORS)]
    AutoReuse = Literal["auto", Reuse]
Estimator = Literal["std", "lsq", "paper"]
Compensation = Literal["auto", "none", Estimator]

# of quantization and its calibration
Precision = Literal["fp32", "fp16", "w8a8", "w7a8", "w4a8", "w8a6"]
GradientRanges = Literal["fisher"]  # those that need gradients
RangeMethod = Literal["max", "percentile", "mse", "entropy", GradientRanges]
ScaleBinding = Literal["static", "time-groups", "per-step", "dynamic"]
Midpoint = Literal["zero", "bounded"]
ProductCorrection = Literal["dec-quant"]
Transform = Literal["smooth", "balance"]
Smoothing = Literal["auto", "none", Transform]
Selector = Literal["tap", "random", "uniform-time", "time-groups", "kmeans", "tap-activations"]
PoolSteps = Literal["computed", "all", "uncached"]

# of where a bundle runs, and is built
Target = Literal["cpu", "openvino", "openvino-bf16", "cuda", "tensorrt", "ort-tensorrt"]
GraphScope = Literal["trajectory", "step", "none"]
Calibrator = Literal["entropy", "minmax"]
Calibration = Literal["explicit", Calibrator]

# of models that come with ditc
BuiltIn = Literal["digits", "emoji"]

# of what is measured
Features = Literal["digits", "emoji", "pixels", "inception"]
Peer = Literal[
    "torch-f32",
    "torch-bf16",
    "torch-compile",
    "cache-dit",
    "onnxruntime-f32",
    "onnxruntime-quant",
    "openvino-f32",
    "openvino-bf16",
    "openvino-int8",
]
PublishedDevice = Literal["orin-nx", "agx-orin", "l4", "h100", "h200"]
Device = Literal["here", PublishedDevice]
Grouping = Literal["layer", "branch", "block"]
BisectMode = Literal["only", "without"]
BisectTarget = Literal["cpu", "tensorrt"]


def names_of(choice: Any) -> tuple[str, ...]:
    """Return the names of one of the lists above, in their order."""
    return get_args(choice)
