"""The closeness to FP of smoothcache on the reference model, beside FORA that computes about as much.

Every cell is one compile in float32 without compensation, and its own check: PSNR of the finished samples against the
uncached program over `--images` images of one noise seed. Prints a row for each, and writes smoothcache.json beside
this script:

    python benchmarks/smoothcache.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.machine import machine

HERE = Path(__file__).parent
OPTIONS = CompileOptions(precision="fp32", vc="none", reference=False)
CELLS = (
    *({"policy": f"smoothcache:{alpha}", "reuse": "hold"} for alpha in (0.1, 0.15, 0.2)),
    *({"policy": f"fora:{interval}", "reuse": reuse} for reuse in ("hold", "taylor") for interval in (2, 3)),
)


def row_of(cell: dict[str, str], images: int, seed: int, work: Path) -> dict[str, Any]:
    """Return the share that one policy computes, and how near it stays to FP."""
    options = OPTIONS.model_copy(update={**cell, "verify_images": images, "seed": seed})
    bundle = compile_model("digits", work / "bundle", options, force=True, exports=work / "exports")
    program, verified = bundle.manifest.program, bundle.manifest.measured("verify").verify
    assert verified is not None
    rows = [program.segment(step.segment).compute for step in program.steps]
    computed = sum(map(sum, rows)) / (len(rows) * len(rows[0]))
    return {
        **cell,
        "seed": seed,
        "n": verified.images,
        "computed": computed,
        "segments": len(program.segments),
        "slots": program.slots,
        "psnr_db_mean": verified.psnr_db_mean,
        "psnr_db_min": verified.psnr_db_min,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as work:
        for seed in arguments.seeds:
            for cell in CELLS:
                rows.append(row_of(cell, arguments.images, seed, Path(work)))
                print(json.dumps(rows[-1]), flush=True)
    result = {"steps": OPTIONS.steps, "machine": machine().model_dump(), "rows": rows}
    (HERE / "smoothcache.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
