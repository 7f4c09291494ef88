"""Run by a runtime without torch: images of a bundle and of its FP program, and what they were computed in.

images.py BUNDLE OUT.npz FP_IMAGES IMAGES
"""

import json
import platform
import sys
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import numpy as np

import ditc

AT_ONCE = 16


def images(pipe, count):
    """Return the first images of seed 0, classes in turn."""
    spec, parts = pipe.bundle.manifest.model, []
    for first in range(0, count, AT_ONCE):
        labels = spec.labels_in_turn(first, min(AT_ONCE, count - first))
        *_, last = pipe.generate(labels, seed=0, first=first)
        parts.append(last.images)
    return np.concatenate(parts)


bundle, out, fp_count, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with ditc.load(bundle, reference=True) as pipe:
    exact = images(pipe, fp_count)
with ditc.load(bundle) as pipe:
    quantized = images(pipe, count)
    worst = max(pipe.differences(), key=attrgetter("excess"))
    integers = pipe.backend.arithmetic(7 if pipe.bundle.manifest.precision == "w7a8" else 8).text
loaded = sorted({"torch", "onnx", "onnx_ir"} & sys.modules.keys())
assert not loaded, f"the runtime loaded {loaded}"
facts = {
    "machine": platform.machine(),
    "python": platform.python_version(),
    "onnxruntime": version("onnxruntime"),
    "numpy": version("numpy"),
    "integers": integers,
    "fingerprint": worst.excess,
}
np.savez(out, exact=exact, found=quantized, facts=json.dumps(facts))
