"""PixArt-Sigma at its released size and 256 pixels, random weights, no text encoder: its compile, and its peers.

    python benchmarks/pixart_sigma.py --work out/pixart [--measure-only] [--layers 1] [--out FILE]

Writes a diffusers folder with random weights (2.4 GB) and random embeddings of texts of 300 tokens, compiles it in a
child process whose wall time and peak resident memory are taken, and measures in turn, in one run, guided at batch 1
(so 2 rows): a step that computes and one that reuses, the same in the bundle's peers. Random weights say something
about time and memory and nothing about images.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from dit_xl import in_turn, ratios

import ditc
from ditc.bundle import open_bundle
from ditc.errors import InputError
from ditc.machine import machine
from ditc.speed.options import peer_names
from ditc.speed.peer_task import ModelChoice, peer_task_of
from ditc.speed.peers import ReadyPeer, ready_peer

HERE = Path(__file__).parent
SIDE, TOKENS, CAPTION, TEXTS = 32, 300, 4096, 4  # of the latent; of a text; how many texts
RELEASED = {"sample_size": SIDE, "caption_channels": CAPTION, "use_additional_conditions": False}
SETTINGS = (
    "--steps 20 --cfg 4.5 --policy fora:3 --points 16 --pool 3 --reuse hold --smooth none --vc none --verify-images 1"
).split()
TARGETS = ("openvino",)  # beside the processor's own
PEERS = "torch-f32,openvino-f32,openvino-int8"


def write_folder(folder: Path, layers: int) -> None:
    """Write the transformer and the scheduler of a pipeline, all of its weights random."""
    torch.manual_seed(0)
    model: Any = PixArtTransformer2DModel(**RELEASED, num_layers=layers)
    model.save_pretrained(folder / "transformer")
    scheduler: Any = DPMSolverMultistepScheduler()
    scheduler.save_pretrained(folder / "scheduler")


def write_texts(path: Path) -> None:
    """Write random embeddings of some texts of different lengths, and of their negative ones."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name in ("text", "null_text"):
        arrays[name] = 0.2 * rng.standard_normal((TEXTS, TOKENS, CAPTION), np.float32)
        lengths = rng.integers(1, TOKENS, TEXTS)
        arrays[f"{name}_mask"] = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    np.savez(path, **arrays)


def compile_cost(folder: Path, texts: Path, bundle: Path) -> dict[str, float]:
    """Return the wall seconds of the compile, and the peak resident bytes of its process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ditc.cli", "compile", str(folder), "--conditions", str(texts), *SETTINGS]
    subprocess.run([*command, "-o", str(bundle), "--force"], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_resident_bytes": peak}


def refused_on(bundle: Path, target: str) -> str | None:
    """Return why a bundle can't run on a target of this machine, None where it can."""
    try:
        with ditc.load(bundle, target=target):
            return None
    except InputError as e:
        return str(e)


def measured(bundle: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the times of a bundle and its peers, in turn."""
    refused = {f"ditc@{target}": refused_on(bundle, target) for target in TARGETS}
    bundles = dict.fromkeys(["ditc", *(name for name, reason in refused.items() if reason is None)], bundle)
    with TemporaryDirectory() as scratch:
        task = peer_task_of(open_bundle(bundle), ModelChoice(str(folder)), Path(scratch).resolve())
        ready_or_reason = {name: ready_peer(name, task) for name in peer_names([options.against])}
        peers = {name: ready for name, ready in ready_or_reason.items() if isinstance(ready, ReadyPeer)}
        times = in_turn(bundles, peers, task, options.rounds)
        return {
            "peers": {name: {"what": r.peer.what, "relative_error": r.relative_error} for name, r in peers.items()},
            "skipped": {n: why for n, why in {**refused, **ready_or_reason}.items() if isinstance(why, str)},
            "relative_error": task.error(task.bundle_output),
            "times": times,
            "ratio_step": ratios(times, bundles, "step"),
            "ratio_run": ratios(times, bundles, "run"),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/pixart"))
    parser.add_argument("--layers", type=int, default=28, help="fewer blocks, to try the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", default=PEERS)
    parser.add_argument("--compile-only", action="store_true", help="measure no steps")
    parser.add_argument("--measure-only", action="store_true", help="take the bundle that is there, keep its cost")
    parser.add_argument("--out", type=Path, default=HERE / "pixart_sigma.json")
    options = parser.parse_args()
    folder, bundle, texts = (options.work / name for name in ("model", "bundle", "texts.npz"))
    if options.measure_only:
        cost = json.loads(options.out.read_text())["compile"]
    else:
        write_folder(folder, options.layers)
        write_texts(texts)
        cost = compile_cost(folder, texts, bundle)
    manifest = open_bundle(bundle).manifest
    results: dict[str, Any] = {
        "machine": machine().model_dump(),
        "parameters": manifest.model.parameters,
        "settings": manifest.settings,
        "compile": cost,
        "deployed_bytes": manifest.size_bytes(reference=False),
        "reference_bytes": manifest.size_bytes(reference=True),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")  # a compile is long, and measuring may fail
    if not options.compile_only:
        results |= measured(bundle, folder, options)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    shown = ("parameters", "compile", "deployed_bytes", "ratio_step", "ratio_run", "skipped")
    print(json.dumps({key: results[key] for key in shown if key in results}, indent=1))


if __name__ == "__main__":
    main()
