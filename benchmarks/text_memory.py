"""The memory that a text encoder takes: while it is exported, on disk, and where a prompt is read; and T5-XXL by that.

    python benchmarks/text_memory.py [--layers 32] [--work out/text_memory]

A T5 of random weights, larger than the 2 GB that one protobuf holds unless `--layers` makes it smaller. Export and run
have a process of their own each. T5-XXL is counted, not run: its parameters times what one took here.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ditc.machine import machine

HERE = Path(__file__).parent
TOKENS = 120
SHARED: dict[str, Any] = {"vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
MEASURED: dict[str, Any] = {**SHARED, "d_model": 1024, "d_ff": 4096, "num_heads": 16}
XXL: dict[str, Any] = {**SHARED, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24}  # t5-v1_1-xxl


def exported(folder: Path, layers: int) -> dict[str, float]:
    """Export such an encoder into a folder; return its parameters, the peak memory in bytes, and its error."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from ditc.compiler.text import Text, export_text
    from ditc.engines.onnxrt import OnnxRuntimeBackend
    from ditc.exporter.text_encoders import TextEncoder
    from ditc.exporter.text_modules import EncoderModule
    from tests.models.captioned import t5_tokenizer

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**MEASURED, num_layers=layers)).eval()
    encoder = TextEncoder(
        name="t5",
        module=EncoderModule(model, ("last",), masked=True),
        tokenizer=t5_tokenizer(),
        length=TOKENS,
        vocabulary=SHARED["vocab_size"],
        gives=("text",),
        mask="text_mask",
    )
    folder.mkdir(parents=True, exist_ok=True)
    export_text(Text((encoder,), (encoder.spec,)), OnnxRuntimeBackend(), folder)
    parity = json.loads((folder / "text.json").read_text())["t5"]["parity"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"parameters": encoder.spec.parameters, "peak_bytes": peak, "parity": parity}


def run_once(folder: Path) -> dict[str, int]:
    """Run the exported encoder on one prompt; return the bytes that are the process's own, and mapped from the file."""
    from ditc.engines.onnxrt import OnnxRuntimeBackend

    engine = OnnxRuntimeBackend().open(folder / "text.t5.onnx")
    binding = engine.binding()
    for name in engine.inputs:
        binding.bind(name, np.ones((1, TOKENS), np.int64))
    binding.bind("text", np.empty((1, TOKENS, MEASURED["d_model"]), np.float32))
    binding.run()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return {"own_bytes": own, "mapped_bytes": mapped}


def parameters_of_xxl() -> int:
    """Count the parameters of T5-XXL's encoder."""
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in T5EncoderModel(T5Config(**XXL)).parameters())


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("out/text_memory"))
    parser.add_argument("--out", type=Path, default=HERE / "text_memory.json")
    given = parser.parse_args()
    compiled = apart(exported, given.work, given.layers)
    size = sum(path.stat().st_size for path in given.work.iterdir())
    ran = apart(run_once, given.work)
    shutil.rmtree(given.work)
    xxl = apart(parameters_of_xxl)
    each = {"peak_bytes": compiled["peak_bytes"], "file_bytes": size, "mapped_bytes": ran["mapped_bytes"]}
    report = {
        "machine": machine().model_dump(mode="json"),
        "encoder": {**MEASURED, "num_layers": given.layers, "tokens": TOKENS, "parameters": compiled["parameters"]},
        "compile": {"peak_bytes": compiled["peak_bytes"], "parity": compiled["parity"]},
        "files": {"bytes": size},
        "run": ran,
        "t5_xxl_by_parameters": {
            "parameters": xxl,
            **{name: round(value / compiled["parameters"] * xxl) for name, value in each.items()},
        },
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
