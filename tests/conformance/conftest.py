"""These tests need the real TensorRT bindings; `test_tensorrt_bindings.py` runs them once for each version."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("DITC_REAL_BINDINGS") else ["test_trt_api.py"]
