"""`ditc export-polygraphy`: inputs as they were, loaders that stand alone, commands that Polygraphy takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.diagnosis.polygraphy_export import export_polygraphy, recorded_calls, recorded_runs
from ditc.diagnosis.polygraphy_scripts import SCRIPTS
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.dit import DiT, DiTConfig
from ditc.files import sha256_of

LATENT = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=5)


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory, quick_options: CompileOptions) -> Bundle:
    """A bundle with every kind of segment: full, a row of its own, reuse, decode."""
    folder = tmp_path_factory.mktemp("decoding")
    torch.manual_seed(0)
    torch.save(DiT(LATENT).state_dict(), folder / "latent.pt")
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8)
    vae.save_pretrained(folder / "vae")
    rows = [[True] * 4, [False] * 4, [False, True, False, True], [True] * 4, [False] * 4, [False, True, False, True]]
    (folder / "policy.json").write_text(json.dumps({"compute": rows}))
    options = quick_options.model_copy(update={"policy": str(folder / "policy.json"), "batch": 2})
    return compile_model(str(folder / "latent.pt"), folder / "b", options, num_heads=4, vae=folder / "vae")


@pytest.fixture(scope="module")
def exported(decoding: Bundle) -> Path:
    out = decoding.path.with_name("exported")
    export_polygraphy(decoding.path, out)
    return out


@pytest.fixture(scope="module")
def small(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the cached bundle, small enough to run Polygraphy on."""
    out = tmp_path_factory.mktemp("small") / "exported"
    export_polygraphy(bundles["cached"].path, out, points=2)
    return out


def segment_names(bundle: Bundle) -> list[str]:
    program = bundle.manifest.program
    return [*program.prologue, *(segment.name for segment in program.segments), *program.epilogue]


def test_calls_are_spread_from_the_first_to_the_last(decoding: Bundle) -> None:
    program = decoding.manifest.program
    row = next(segment.name for segment in program.segments if segment.name.startswith("row-"))
    assert recorded_calls(program, 4) == {"condition": [0], "full": [0, 1], "reuse": [0, 1], row: [0, 1], "decode": [0]}
    longer = program.model_copy(update={"steps": program.steps[:1] * 50, "epilogue": ()})
    assert recorded_calls(longer, 4) == {"condition": [0], "full": [0, 16, 33, 49]}
    assert recorded_calls(longer, 1) == {"condition": [0], "full": [0]}


def test_recorded_inputs_are_what_each_segment_got(decoding: Bundle) -> None:
    """Run again on its own, each segment gives bit for bit what the run made of it."""
    backend = OnnxRuntimeBackend()
    runs = recorded_runs(decoding, 2)
    assert list(runs) == segment_names(decoding)
    for name, recorded in runs.items():
        session = backend.session(runnable_path(decoding.segment_path(name), backend.name))
        for point in recorded:
            outputs = session.run(list(point.outputs), dict(point.inputs))
            for output, values in zip(point.outputs, outputs, strict=True):
                assert np.isfinite(values).all()
                np.testing.assert_array_equal(values, point.outputs[output])


def test_recorded_inputs_are_those_of_the_step(decoding: Bundle, exported: Path) -> None:
    labels = [0, 1]
    with ditc.load(decoding.path) as pipe:
        events = list(pipe.generate(labels))
    for name in ("full", "reuse"):
        at = [event.before for event in events if event.segment == name]
        with np.load(exported / "inputs" / f"{name}.npz") as file:
            np.testing.assert_array_equal(file["x"][:, : len(labels)], at)
    with np.load(exported / "inputs" / "decode.npz") as file:
        np.testing.assert_array_equal(file["latent"], [events[-1].x])


def test_cached_inputs_are_recorded_as_the_computing_step_wrote_them(decoding: Bundle, exported: Path) -> None:
    written = recorded_runs(decoding, 4)["full"]
    with np.load(exported / "inputs" / "reuse.npz") as file:
        caches = [name for name in file.files if name.startswith("cache.")]
        assert len(caches) == 4
        for name in caches:
            np.testing.assert_array_equal(file[name], [point.outputs[name] for point in written])


PRINT_POINTS = """
import sys
sys.modules.update(dict.fromkeys(["ditc", "onnx", "onnxruntime", "torch", "polygraphy", "tensorrt"]))
import importlib.util, json
spec = importlib.util.spec_from_file_location("loader", sys.argv[1])
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
points = [{name: [str(a.dtype), a.shape, bool((a == a).all())] for name, a in p.items()} for p in loader.load_data()]
print(json.dumps([points, len(list(loader.load_first()))]))
"""


@pytest.mark.parametrize(("suffix", "form"), [("", ""), ("_trt", ".trt")])
def test_loaders_need_numpy_only_and_give_what_the_graph_takes(
    suffix: str, form: str, decoding: Bundle, exported: Path, tmp_path: Path
) -> None:
    for name in segment_names(decoding):
        loader = exported / f"loader_{name}{suffix}.py"
        command = [sys.executable, "-c", PRINT_POINTS, str(loader)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        points, first = json.loads(done.stdout)
        assert (len(points), first) == (1 if name in ("condition", "decode") else 2, 1)
        inputs = ir.load(decoding.path / "segments" / f"{name}{form}.onnx").graph.inputs
        assert list(points[0]) == [value.name for value in inputs]
        for value in inputs:
            dtype, shape, whole = points[0][value.name]
            assert whole
            assert dtype == value.dtype.numpy().name
            open_sizes = {"batch": (2 if name == "decode" else 4), "steps": 6}
            assert shape == [size if isinstance(size, int) else open_sizes[str(size)] for size in value.shape]


def test_the_typed_form_gets_half_precision_where_it_says_so(exported: Path) -> None:
    text = (exported / "loader_reuse_trt.py").read_text()
    assert "'x': 'float32'" in text
    assert "'cache.blocks.0.attn': 'float16'" in text
    assert "float16" not in (exported / "loader_reuse.py").read_text()


RECORD_COMMAND = """\
#!{python}
import json, os, sys
with open(os.environ["COMMANDS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(sys.argv[1] == "run" and "static.onnx" in sys.argv[2])
"""


@pytest.fixture(scope="module")
def commands(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """The Polygraphy commands of every script, as bash hands them over; all segments, every stage."""
    folder = tmp_path_factory.mktemp("stub")
    stub = folder / "polygraphy"
    stub.write_text(RECORD_COMMAND.format(python=sys.executable))
    stub.chmod(0o755)
    work = folder / "exported"
    shutil.copytree(exported, work)
    (work / "out").mkdir()
    for inputs in (exported / "inputs").iterdir():
        for ending in ("plan", "bisected.onnx"):  # what earlier commands would have left
            (work / "out" / f"{inputs.stem}.{ending}").touch()
    commands_of = {}
    for script in sorted(work.glob("*.sh")):
        record = folder / f"{script.stem}.jsonl"
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "BUNDLE": str(exported.with_name("b")),
            "COMMANDS": str(record),
            "LINEAR": "1",
        }
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False, cwd=folder)
        assert done.stderr == ""
        assert done.returncode == (1 if script.stem.startswith("reduce") else 0)
        commands_of[script.name] = [json.loads(line) for line in record.read_text().splitlines()]
    return commands_of


def test_every_script_has_commands_for_every_segment(commands: dict[str, list[list[str]]], decoding: Bundle) -> None:
    assert set(commands) == {script.name for script in SCRIPTS}
    for name, lines in commands.items():
        words = {word for line in lines for word in line}
        with_commands = {segment for segment in segment_names(decoding) if any(f"/{segment}." in w for w in words)}
        # the calibrator is for the only segment with an FP form of its own
        assert with_commands == ({"full"} if name == "calibrate_tensorrt10.sh" else set(segment_names(decoding)))


def test_every_file_named_in_a_command_exists(commands: dict[str, list[list[str]]], exported: Path) -> None:
    named = {word for lines in commands.values() for line in lines for word in line}
    loaders = {word.split(":")[0] for word in named if word.startswith("loader_")}
    models = {word for word in named if word.endswith(".onnx") and not word.startswith("out/")}
    assert len(models) == 5 + 2 + 5 + 1  # portable, ONNX Runtime's form of the quantized, TensorRT's, FP
    for path in (*(exported / loader for loader in loaders), *map(Path, models)):
        assert path.is_file(), path


def test_what_later_commands_read_earlier_ones_wrote(commands: dict[str, list[list[str]]]) -> None:
    left_by_others = re.compile(r"out/(.*\.plan|timing\.cache)")
    writing = ("--save-inputs", "--save-outputs", "-o", "--iter-artifact", "--save-engine", "--calibration-cache")
    for name, lines in commands.items():
        written: set[str] = set()
        for line in lines:
            written |= {word for option, word in pairwise(line) if option in writing}
            read = {word for word in line if word.startswith("out/")} - written
            assert all(left_by_others.fullmatch(word) or "replay" in word for word in read), (name, read)


PARSE = """
import json, sys, warnings
import argparse
from polygraphy.tools.registry import TOOL_REGISTRY
parser = argparse.ArgumentParser()
tools = parser.add_subparsers(dest="tools", required=True)
for tool in TOOL_REGISTRY:
    tool.setup_parser(tools)
for line in json.load(sys.stdin):
    args, unknown = parser.parse_known_args(line)
    assert not unknown, (line, unknown)
    args.subcommand.parse(args)
    if line[0] == "run":
        assert not args.subcommand.run(args), line
assert "tensorrt" not in sys.modules
"""


def test_polygraphy_takes_every_command_line(commands: dict[str, list[list[str]]]) -> None:
    """Its own parser, and for `run` its script generator, which resolves every option; TensorRT is not imported."""
    pytest.importorskip("polygraphy")
    lines = []
    for of_script in commands.values():
        for line in of_script:
            lines.append(line)
            if "--check" in line:
                check = line[line.index("--check") + 1 :]
                assert check[0] == "polygraphy"
                lines.append(check[1:])
    lines = [[*line, "--gen", os.devnull] if line[0] == "run" else line for line in lines]
    # of each segment: compare, layers; in reduce the whole, and bisect and linear with a check each
    assert sum("--trt" in line for line in lines) == 5 * (2 + 1 + 2 * 2)
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]


def run_script(folder: Path, name: str, *segments: str) -> subprocess.CompletedProcess[str]:
    """A script with the real Polygraphy, which loads torch where it finds it: seconds per command, so it doesn't."""
    pytest.importorskip("polygraphy")
    hidden = folder.with_name("hidden")
    hidden.mkdir(exist_ok=True)
    (hidden / "torch.py").write_text("raise ImportError")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(hidden)}
    command = [folder / name, *segments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_comparison_in_onnx_runtime_passes_in_polygraphy(small: Path) -> None:
    done = run_script(small, "compare_onnxrt.sh")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    # three forms of full, two of the others; two points of full and reuse
    assert done.stdout.count("Passed: 2/2 iterations") == 3 + 2
    assert done.stdout.count("Passed: 1/1 iterations") == 2


def test_a_comparison_out_of_tolerance_fails_the_script(small: Path, tmp_path: Path) -> None:
    work = small.with_name("tightened")
    shutil.copytree(small, work)
    script = work / "compare_onnxrt.sh"
    script.write_text(re.sub(r"out:[\d.e-]+", "out:1e-12", script.read_text()))
    done = run_script(work, "compare_onnxrt.sh", "full")
    assert done.returncode == 1
    assert "FAILED | simple | Mismatched outputs: ['out']" in done.stdout + done.stderr


def test_every_tensor_of_the_typed_form_is_near_the_portable_one_in_polygraphy(small: Path) -> None:
    done = run_script(small, "layers_onnxrt.sh", "reuse")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "PASSED | SNR | All outputs matched" in done.stdout


def test_a_script_refuses_a_segment_that_is_not_there(small: Path) -> None:
    done = run_script(small, "compare_onnxrt.sh", "fulll")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown segment fulll; choose from: condition full reuse" in done.stderr


def test_a_script_says_where_it_looked_for_the_bundle(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "elsewhere" / "exported")
    done = run_script(tmp_path / "elsewhere" / "exported", "compare_onnxrt.sh")
    assert done.returncode == 2
    assert "set BUNDLE to its path" in done.stderr


def test_no_file_names_an_absolute_path(exported: Path) -> None:
    place = re.compile(r"(?<![\w.*\]}\"$/])/[A-Za-z]\w+")  # not a/b, ../b, "$BUNDLE/b" or ./b
    for file in exported.rglob("*"):
        if file.suffix in (".py", ".sh", ".md"):
            text = file.read_text().replace("#!/usr/bin/env", "").replace("/dev/null", "")
            assert not place.findall(text), file
            assert str(exported.parent) not in text


def test_the_bundle_is_left_as_it_was(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = bundles["cached"].path
    before = {file: (sha256_of(file), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    export_polygraphy(path, tmp_path / "exported", points=1)
    after = {file: (sha256_of(file), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    assert before == after


def test_the_same_bundle_gives_the_same_files(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        export_polygraphy(bundles["cached"].path, tmp_path / "exported", points=1, force=True)
        files = (file for file in (tmp_path / "exported").rglob("*") if file.is_file())
        digests.append({file.name: sha256_of(file) for file in files})
    assert digests[0] == digests[1]


def test_a_bundle_without_a_typed_form_goes_without_tensorrt_and_says_so(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert run(["export-polygraphy", str(bundles["fp32-cached"].path), "-o", str(out)]) == 0
    assert "nothing for TensorRT" in capsys.readouterr().out
    assert not [file.name for file in out.rglob("*") if "trt" in file.name or "tensorrt" in file.name]
    assert all("--trt" not in file.read_text() for file in out.glob("*.sh"))
    assert "is left out" in (out / "README.md").read_text()


def test_scales_of_the_step_are_recorded_and_kept_from_the_fp_graph(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["per-step"]
    export_polygraphy(bundle.path, tmp_path / "out", points=2)
    with np.load(tmp_path / "out" / "inputs" / "full.npz") as inputs:
        np.testing.assert_array_equal(inputs["scales"], bundle.tables()["scales.activation"][[0, 4]])
    typed, fp = (
        [line for line in (tmp_path / "out" / name).read_text().splitlines() if "shapes=(" in line]
        for name in ("compare_tensorrt.sh", "calibrate_tensorrt10.sh")
    )
    assert any("scales:[8]" in line for line in typed)
    assert not any("scales:[8]" in line for line in fp[-1:])  # the one that holds
    done = run_script(tmp_path / "out", "layers_onnxrt.sh", "full")
    assert done.returncode == 0, done.stdout


def test_json_lists_steps_inputs_and_files(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert run(["export-polygraphy", str(bundles["cached"].path), "-o", str(out), "--points", "2", "--json"]) == 0
    export = json.loads(capsys.readouterr().out)
    assert export["tensorrt"]
    assert export["segments"]["full"]["steps"] == [0, 4]
    assert export["segments"]["reuse"]["steps"] == [1, 5]
    assert export["segments"]["condition"]["inputs"] == {"t": [6], "y": [8]}
    assert sorted(export["files"]) == sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file())
    assert all(os.access(script, os.X_OK) for script in out.glob("*.sh"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{bundle} -o {out}/taken", "exists already"),
        ("{bundle} -o {out}/taken --force", "was not made by export-polygraphy"),
        ("{bundle} -o {bundle}/exported", "lie one in the other"),
        ("{bundle} -o {bundle}/.. --force", "lie one in the other"),
        ("{bundle} -o {out}/new --points 0", "--points must be at least 1, found 0"),
        ("{out}/nowhere -o {out}/new", "is not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_leaves_everything_as_it_was(
    arguments: str, message: str, bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("# Something else")
    filled = arguments.format(bundle=bundles["cached"].path, out=tmp_path).split()
    assert run(["export-polygraphy", *filled]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
    assert bundles["cached"].path.is_dir()
