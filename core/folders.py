"""The folders of the project beside `core`, in the order of the arrow: each imports only those to its left.

What has to know all of them reads this list: setup.py, the Makefile, the digest of ditc's own code, the tests. It
imports nothing, so that it can be read before anything is installed.
"""

__all__ = ["FOLDERS"]

FOLDERS = (
    "exporter",
    "calib_data",
    "quantize",
    "lowering",
    "engines",
    "runtime",
    "speed",
    "compiler",
    "quality",
    "diagnosis",
    "report",
    "cli",
)
