"""The demo's figures as JSON: the reference model, torch float32 eager against the bundle, in the same run.

python benchmarks/end_to_end.py
"""

from __future__ import annotations

import json
from pathlib import Path

from ditc.cli.compiling import print_demo
from ditc.compiler.options import CompileOptions
from ditc.machine import machine
from ditc.progress import silent
from ditc.quality.demo import run_demo

HERE = Path(__file__).parent


def main() -> None:
    demo = run_demo(Path("out/bench"), CompileOptions(), silent)
    print_demo(demo)
    measured = {"machine": machine().model_dump()} | demo.model_dump(mode="json")
    (HERE / "end_to_end.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
