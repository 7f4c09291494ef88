"""Shared pieces: small models, and bundles that are compiled once in a run, whichever of its processes asks first."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, settings

from ditc.bundle import Bundle, open_bundle
from ditc.compiler import driver, pooling, quantizing
from ditc.compiler.driver import compile_model
from ditc.compiler.exporting import behaviour_digest, model_digest
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import import_onnxruntime
from ditc.exporter import emoji
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.emoji_model import build_emoji_model, float16_bytes, train_tokenizer
from ditc.exporter.emoji_rows import typical_captions
from ditc.exporter.router_files import write_routers
from ditc.files import atomic_write, digest_of, in_turn
from ditc.routers import Routers
from ditc.runtime.pipeline import Pipeline, load
from tests.models.two_streams import dual

# a busy machine stalls now and then, which says nothing of a law or of how its examples are made
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

MOST_WORKERS = 8  # each holds torch and what it compiles: about a gigabyte
SMALL = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
QUICK = CompileOptions(
    steps=6, points=24, pool_images=24, vc_images=8, verify_images=4, batch=4, reuse="hold", smooth="none", vc="std"
)
# the small model under several policies and precisions; "model" names another one
BUNDLES: dict[str, dict[str, Any]] = {
    "cached": {"policy": "fora:2"},
    "per-step": {"policy": "fora:2", "scales": "per-step", "midpoint": "bounded", "vc": "none"},
    "w4a8": {"policy": "fora:2", "precision": "w4a8", "vc": "none"},
    "w4a8-corrected": {"policy": "fora:2", "precision": "w4a8", "vc": "none", "correct": "dec-quant"},
    "rotated": {"policy": "fora:2", "rotate": 16, "smooth": "smooth", "vc": "none"},
    "float-ends": {
        "policy": "fora:2",
        "float_steps": "1:2",
        "reuse": "affine",
        "smooth": "smooth",
        "vc": "none",
        "scales": "per-step",
        "midpoint": "bounded",
    },
    "fp32-cached": {"policy": "fora:2", "precision": "fp32", "vc": "none"},
    "fp32-branches": {"policy": "fora:2", "precision": "fp32", "vc": "none", "caches": "branches"},
    "fp32-taylor": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "taylor"},
    "fp32-taylor-8": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "taylor", "steps": 8},
    "fp32-taylor-2": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "taylor:2", "steps": 8},
    "fp32-taylor-3": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "taylor:3", "steps": 8},
    "fp32-chebyshev": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "chebyshev", "steps": 8},
    "fp32-hermite": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "hermite", "steps": 8},
    "fp32-affine": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "affine"},
    "fp32-affine-open": {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "affine:open"},
    "memory": {"policy": "fora:2", "precision": "fp32", "vc": "std", "sampler": "unipc"},
    "memory-int8": {"policy": "fora:2", "sampler": "dpm++3m", "vc": "none"},
    "memory-noise": {"policy": "fora:2", "precision": "fp32", "vc": "none", "sampler": "dpm++2m-sde"},
    "memory-last": {"policy": "none", "precision": "fp32", "vc": "none", "sampler": "dpm++2m-sde"},
    "noise": {"policy": "fora:2", "precision": "fp32", "vc": "none", "sampler": "ddpm"},
    "memory-none": {"policy": "none", "precision": "fp32", "vc": "none", "sampler": "unipc"},
    "memory-fora1": {"policy": "fora:1", "precision": "fp32", "vc": "none", "sampler": "unipc"},
    "fp32-none": {"policy": "none", "precision": "fp32", "vc": "none"},
    "fp32-fora1": {"policy": "fora:1", "precision": "fp32", "vc": "none"},
    "streams-rotated": {"model": "two-streams", "policy": "fora:2", "rotate": 16, "smooth": "smooth", "vc": "none"},
    # the same of a model of two streams, with two outputs and gates of its first branches' image
    "streams": {"model": "two-streams", "policy": "fora:2", "smooth": "smooth"},
    # the file of routers lies in the folder of the run
    "fp32-l2c": {"policy": "l2c:{routers}:0.5:3", "precision": "fp32", "vc": "none"},
    "l2c": {"policy": "l2c:{routers}:0.5:3"},
    "fp32-l2c-0": {"policy": "l2c:{routers}:0", "precision": "fp32", "vc": "none"},
    "fp32-l2c-1": {"policy": "l2c:{routers}:1", "precision": "fp32", "vc": "none"},
    "streams-rows": {"model": "two-streams", "policy": str(Path(__file__).parent / "models" / "two_streams.json")},
    "streams-fp32-cached": {"model": "two-streams", "policy": "fora:2", "precision": "fp32", "vc": "none"},
    "streams-fp32-branches": {
        "model": "two-streams",
        "policy": "fora:2",
        "precision": "fp32",
        "vc": "none",
        "caches": "branches",
    },
    "streams-fp32-none": {"model": "two-streams", "policy": "none", "precision": "fp32", "vc": "none"},
    "streams-fp32-fora1": {"model": "two-streams", "policy": "fora:1", "precision": "fp32", "vc": "none"},
}
# the text-to-image model that comes with ditc, uncached in FP32
EMOJI_EXACT = CompileOptions(steps=3, cfg=2.0, policy="none", precision="fp32", vc="none", verify_images=1)
# of the constants of a graph that is written as text
KINDS = {"float32": "float", "int64": "int64"}
# the compiler as it is before a test plays a fault in it
COMPILER = {module: dict(vars(module)) for module in (driver, pooling, quantizing)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, as it does for a user: a shell's background jobs are started deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, so that nobody waits for them at the end."""
    items.sort(key=_most_seconds, reverse=True)


def _most_seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """A compile collects garbage after each of its stages. What is alive before a module begins is left out of it.

    That is mostly torch and ONNX as they were imported; looking through them takes longer than a small model's stages.
    """
    gc.collect()
    gc.freeze()


def small_model(**changes: int) -> DiT:
    """A DiT with random weights, the same ones every time: 3 channels, 16 tokens, two blocks, no zero gates.

    `changes` are fields of its configuration that are to be others.
    """
    torch.manual_seed(0)
    model = DiT(replace(SMALL, **changes), name="small").eval()  # type: ignore[arg-type]
    model.cfg_channels = 2
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "small": small_model,
    "two-streams": lambda: dual().eval(),
}


@pytest.fixture(scope="session")
def make_small_model() -> Callable[..., DiT]:
    return small_model


@pytest.fixture(scope="session")
def quick_options() -> CompileOptions:
    return QUICK


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base  # a worker's own lies in the run's


@pytest.fixture(scope="session")
def exports(run_folder: Path) -> Path:
    """A folder of exported segments, for tests that compile a model others compile too."""
    return run_folder / "exports"


@pytest.fixture(scope="session")
def partial_schedule(run_folder: Path) -> Path:
    """A schedule with full, empty and partial rows: attention reused while the MLPs compute."""
    rows = [[True] * 4, [False] * 4, [False, True, False, True], [False] * 4, [True] * 4, [False] * 4]
    atomic_write(run_folder / "schedule.json", json.dumps({"compute": rows}).encode())
    return run_folder / "schedule.json"


@pytest.fixture(scope="session")
def emoji_files(run_folder: Path) -> Iterator[Path]:
    """Files of the text-to-image model: random weights, the same every time, and the tokenizer of a few captions."""
    folder = run_folder / "emoji"
    with in_turn(run_folder / "emoji.lock"):
        if not (folder / emoji.WEIGHTS).is_file():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                weights = float16_bytes(build_emoji_model())
            folder.mkdir(exist_ok=True)
            atomic_write(folder / emoji.TOKENIZER, train_tokenizer(typical_captions(), size=600).to_str().encode())
            atomic_write(folder / emoji.WEIGHTS, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "FOLDER", folder)
        yield folder


@pytest.fixture(scope="session")
def small_routers(run_folder: Path) -> Path:
    """Routers of the small model's six steps: at 0.5 each step that reuses has a row of its own, the last an empty one.

    In the released form, the last step first; those of steps that compute everything say nothing.
    """
    rows = [
        (-2.0, -3.0, -2.0, -1.0),
        (0.3,) * 4,
        (-2.0, 2.0, -1.0, 3.0),
        (-0.3,) * 4,
        (1.0, -1.0, -2.0, -2.0),
        (0.0,) * 4,
    ]
    write_routers(run_folder / "routers.pt", Routers(tuple(rows)))
    return run_folder / "routers.pt"


@pytest.fixture(scope="session")
def compiled_once(run_folder: Path, exports: Path) -> Callable[..., Bundle]:
    """Compiles a model for tests that share the bundle: it is not to be changed, only copied.

    One process makes it, and the others wait. Arguments are those of `compile_model`, without a place.
    """

    def bundle_of(model: Any, options: CompileOptions, **given: Any) -> Bundle:
        key = digest_of([_described(model), options.model_dump(), {name: str(value) for name, value in given.items()}])
        path = run_folder / "compiled" / key
        with in_turn(path.with_suffix(".lock")):
            if path.is_dir():
                return open_bundle(path)
            assert not _played_with(), "ask for shared bundles before a fault is played: others get the same ones"
            return compile_model(model, path, options, exports=exports, **given)

    return bundle_of


def _played_with() -> list[str]:
    """Names in the compiler that a test has replaced."""
    return [
        name
        for module, before in COMPILER.items()
        for name, value in before.items()
        if vars(module).get(name) is not value
    ]


def _described(model: Any) -> list[Any]:
    """Return the marks that tell a model from others: its name, or all that it computes."""
    if isinstance(model, str):
        return [model]
    return [model.spec.model_dump(mode="json"), model_digest(model), behaviour_digest(model)]


class Bundles(Mapping[str, Bundle]):
    """The small models under each of some settings, by name, compiled when it is first asked for."""

    def __init__(
        self, compiled_once: Callable[..., Bundle], settings: Mapping[str, Mapping[str, Any]], routers: Path
    ) -> None:
        self._compiled_once = compiled_once
        self._routers = routers
        self._settings = settings
        self._compiled: dict[str, Bundle] = {}

    def __getitem__(self, name: str) -> Bundle:
        if name not in self._compiled:
            settings = {"model": "small", **self._settings[name]}
            model = MODELS[settings.pop("model")]()
            settings["policy"] = settings["policy"].format(routers=self._routers)
            self._compiled[name] = self._compiled_once(model, QUICK.model_copy(update=settings))
        return self._compiled[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


@pytest.fixture(scope="session")
def bundles(compiled_once: Callable[..., Bundle], small_routers: Path) -> Mapping[str, Bundle]:
    """The small models compiled under several policies and precisions, by name; not to be changed."""
    return Bundles(compiled_once, BUNDLES, small_routers)


class Pipes(dict[str, Pipeline]):
    """Open pipelines of bundles, by name, each opened when it is first asked for."""

    def __init__(self, bundles: Mapping[str, Bundle], stack: ExitStack) -> None:
        super().__init__()
        self._bundles = bundles
        self._stack = stack

    def __missing__(self, name: str) -> Pipeline:
        self[name] = self._stack.enter_context(load(self._bundles[name].path))
        return self[name]


@pytest.fixture
def pipes(bundles: Mapping[str, Bundle]) -> Iterator[dict[str, Pipeline]]:
    """An open pipeline of every bundle."""
    with ExitStack() as stack:
        yield Pipes(bundles, stack)


@pytest.fixture(scope="session")
def cached_bundle_path(bundles: dict[str, Bundle]) -> Path:
    return bundles["cached"].path


def graph_from_text(inputs: str, outputs: str, body: str, **constants: np.ndarray) -> ir.Model:
    """A model with inferred shapes; `constants` are its initializers, by name."""
    declared = [f"{KINDS[str(v.dtype)]}[{', '.join(map(str, v.shape))}] {name}" for name, v in constants.items()]
    head = '<ir_version: 10, opset_import: ["" : 20]>'
    proto = onnx.parser.parse_model(f"{head} g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}")
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        proto.graph.input.remove(next(port for port in proto.graph.input if port.name == name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def run_graph(model: ir.Model, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every output, by ONNX Runtime."""
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture
def make_graph() -> Callable[..., ir.Model]:
    return graph_from_text


@pytest.fixture
def run_model() -> Callable[..., dict[str, np.ndarray]]:
    return run_graph
