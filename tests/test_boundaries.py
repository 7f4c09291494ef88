"""Modules that may be loaded, and where: the runtime without torch, the command line at once."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ditc.folders import FOLDERS

ROOT = Path(__file__).parents[1]
COMPILE_ONLY = "torch", "onnx", "onnx_ir", "onnxscript", "sklearn", "scipy", "diffusers"
HEAVY = "torch", "onnx", "onnxscript", "sklearn", "scipy", "tensorrt", "diffusers"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    report = "\nimport sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_the_arrow_has_every_folder_of_the_list_and_no_other() -> None:
    """import-linter passes over a folder that its contract doesn't name."""
    arrow = (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("ditc.errors")[0]
    assert sorted(re.findall(r"ditc\.(\w+)", arrow)) == sorted(FOLDERS)


def imported_by(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it, as their files have them: "speed/rates"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ditc."):
            place = str(node.module).removeprefix("ditc.").replace(".", "/")
            names |= {place if "/" in place or place in FOLDERS else f"core/{place}"}
    return names


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Inside a folder too, and inside functions: who is in a circle can't be understood, nor moved, by itself."""
    paths = (path for folder in ("core", *FOLDERS) for path in (ROOT / folder).glob("*.py"))
    imports = {str(path.relative_to(ROOT).with_suffix("")): imported_by(path) for path in paths}
    while leaves := {name for name, needed in imports.items() if not needed & imports.keys()}:
        imports = {name: needed for name, needed in imports.items() if name not in leaves}
    assert imports == {}


def test_generating_from_a_bundle_loads_no_torch(cached_bundle_path: Path) -> None:
    code = f"import ditc\nwith ditc.load({str(cached_bundle_path)!r}) as pipe: pipe.images([1, 2])"
    loaded = modules_after(code)
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("command", ["run", "verify", "evaluate", "inspect", "bench", "report", "doctor"])
def test_a_deployment_runs_every_command_but_those_that_make_graphs_without_the_compiler(
    command: str, cached_bundle_path: Path, tmp_path: Path
) -> None:
    """Packages that only compiling needs are made unimportable, as where they are not installed."""
    arguments = {
        "run": ["run", str(cached_bundle_path), "--labels", "1", "-o", str(tmp_path / "images")],
        "verify": ["verify", str(cached_bundle_path), "--images", "1"],
        "evaluate": ["evaluate", str(cached_bundle_path), *"--images 8 --seeds 0 --rounds 5 --step-images 2".split()],
        "inspect": ["inspect", str(cached_bundle_path)],
        "bench": ["bench", str(cached_bundle_path), "--requests", "1"],
        "report": ["report", str(cached_bundle_path), *f"--images 1 --requests 1 -o {tmp_path / 'r.html'}".split()],
        "doctor": ["doctor"],
    }[command]
    code = f"import sys\nfor name in {COMPILE_ONLY!r}: sys.modules[name] = None\n"
    code += f"from ditc.cli.main import run\nsys.exit(run({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_building_and_serving_with_tensorrt_needs_neither_onnx_nor_onnxruntime(cached_bundle_path: Path) -> None:
    """As on a Jetson: NumPy, pydantic, and TensorRT where it is installed."""
    code = f"import sys\nfor name in {(*COMPILE_ONLY, 'onnxruntime')!r}: sys.modules[name] = None\n"
    code += "import ditc.engines.trt_worker, ditc.engines.trt_builder, ditc.engines.calibrator\n"
    code += "import ditc.runtime.device_executor, ditc.engines.trt_runtime, ditc.engines.host_engine\n"
    code += f"from ditc.cli.main import run\nbundle = {str(cached_bundle_path)!r}\n"
    code += "assert run(['inspect', bundle]) == 0\n"
    code += "assert run(['run', bundle, '--target', 'tensorrt', '--labels', '1', '-o', 'o']) == 2\n"
    code += "sys.exit(run(['build', bundle]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cuda-core can't be imported" in done.stderr
    assert "TensorRT can't be imported" in done.stderr


@pytest.mark.parametrize("command", ["compile", "bisect"])
def test_making_graphs_without_the_compiler_says_what_to_install(
    command: str, cached_bundle_path: Path, tmp_path: Path
) -> None:
    arguments = {
        "compile": ["compile", "digits", "-o", str(tmp_path / "b")],
        "bisect": ["bisect", str(cached_bundle_path)],
    }[command]
    code = "import sys\nfor name in ('torch', 'onnx_ir'): sys.modules[name] = None\n"
    code += f"from ditc.cli.main import run\nsys.exit(run({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'ditc[export]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_importing_ditc_loads_nothing_heavy() -> None:
    assert modules_after("import ditc").isdisjoint({*HEAVY, "numpy", "onnxruntime", "pydantic"})


@pytest.mark.parametrize("arguments", ["--help", "compile --help", "run --help"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    code = f"from ditc.cli.main import run; assert run({arguments.split()!r}) == 0"
    assert modules_after(code).isdisjoint({*HEAVY, "numpy", "onnxruntime"})


def test_help_answers_at_once() -> None:
    """In processor time of this machine now, counted in what the libraries of a command line take to load."""
    libraries = "import click, pydantic, rich.console"
    commands = {"help": ["-m", "ditc.cli", "--help"], "bare": ["-c", "pass"], "libraries": ["-c", libraries]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5):
        for name, arguments in commands.items():
            start = spent_by_children()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            seconds[name].append(spent_by_children() - start)
    bare, libraries_alone, whole = (min(seconds[name]) for name in ("bare", "libraries", "help"))
    assert whole - bare < 4 * (libraries_alone - bare)


def spent_by_children() -> float:
    """Seconds of processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
