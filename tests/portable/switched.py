"""The tests as on a CPU without VNNI: integer products of 8-bit weights count as exact with the switch alone.

    PYTHONPATH=tests/portable .venv/bin/pytest -p switched -m "not slow" -n auto

What the sessions of segments run is then what runs there. Processes that tests start are as ever.
"""

from ditc.engines import onnxrt
from ditc.engines.integer_form import Exactness

onnxrt.onnxruntime_exactness = lambda: Exactness(plain=7, switched=8)
