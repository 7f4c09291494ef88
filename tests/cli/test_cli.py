"""The command line: documented, one line for every bad input, JSON where it is asked for."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

import ditc
from ditc.bundle import Bundle
from ditc.checks import Verification
from ditc.cli.compiling import print_demo
from ditc.cli.headings import GENERAL, by_group
from ditc.cli.main import cli, run
from ditc.cli.output import print_record
from ditc.cli.progress import advice_on_stderr
from ditc.cli.reference import rewritten
from ditc.compiler.options import CompileOptions
from ditc.engines import onnxrt
from ditc.engines.integer_form import Arithmetic, Exactness, advise
from ditc.files import sha256_of
from ditc.quality.demo import BundleSide, Demo, TorchSide
from ditc.quality.options import SEARCHED
from ditc.runtime.images import to_bytes
from ditc.runtime.pipeline import load
from ditc.settings import flag_of

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(cli.commands)


def test_the_commands_are_the_ones_announced() -> None:
    assert {"demo", "compile", "run", "inspect", "verify", "bisect", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert f"## ditc {name}\n" in text
    own = text.split(f"## ditc {name}\n")[1].split("\n## ")[0]
    command = cli.commands[name]
    assert command.help
    assert command.help.splitlines()[0] in own
    if "Further all options of [`compile`]" in own:
        own += text.split("## ditc compile\n")[1].split("\n## ")[0]
    for option in command.params:
        for flag in (*option.opts, *option.secondary_opts):
            if flag.startswith("--") and flag != "--json" and not getattr(option, "hidden", False):
                assert f"`{flag}" in own, f"docs/cli.md lacks {flag} of ditc {name}"


def test_the_tables_of_the_reference_are_those_of_the_options() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert rewritten(text) == text, "write them anew: python -m ditc.cli.reference docs/cli.md"


def test_help_shows_the_ten_options_of_a_compile_that_matter_first() -> None:
    groups = by_group(option for option in cli.commands["compile"].params if isinstance(option, click.Option))
    assert [option.opts[-1] for option in groups[""]] == (
        "--out --random --vae --steps --sampler --cfg --policy --precision --target --seed".split()
    )
    assert list(groups)[-1] == GENERAL
    assert sum(map(len, groups.values())) == len(cli.commands["compile"].params) - 1  # MODEL is an argument


@pytest.mark.parametrize("name", SEARCHED)
def test_tune_does_not_show_what_it_searches_and_refuses_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = flag_of(CompileOptions, name)
    option = next(option for option in cli.commands["tune"].params if flag in option.opts)
    assert isinstance(option, click.Option)
    assert option.hidden
    value = "4" if name == "watch_images" else "none"
    assert run(["tune", "digits", "-o", "o", "--least-psnr", "1", flag, value]) == 2
    assert capsys.readouterr().err == f"ditc: {flag} is what tune searches; leave it out, or use ditc compile\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_speaks_json(name: str) -> None:
    assert "--json" in {flag for option in cli.commands[name].params for flag in option.opts}


def test_every_picture_says_which_bundle_seed_class_and_version_made_it(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["cached"]
    assert run(["run", str(bundle.path), "--labels", "3,0", "--seed", "9", "-o", str(tmp_path)]) == 0
    said = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            said[path.name] = picture.text  # type: ignore[attr-defined]
    for own, first, classes in (("0000-class3.png", "0", "3"), ("0001-class0.png", "1", "0"), ("grid.png", "0", "3,0")):
        assert said.pop(own) == {
            "Software": f"ditc {ditc.__version__}",
            "ditc.bundle": sha256_of(bundle.path / "manifest.json"),
            "ditc.model": "small",
            "ditc.seed": "9",
            "ditc.first": first,
            "ditc.classes": classes,
        }
    assert not said


def test_run_writes_a_picture_per_label_and_a_grid(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images"
    assert run(["run", str(bundles["cached"].path), "--labels", "0,3,4", "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == ["0000-class0.png", "0001-class3.png", "0002-class4.png"]
    assert printed["segments"]["full"]["calls"] == 3
    assert len(printed["steps"]) == 6
    assert size_of(out / "0001-class3.png") == (8, 8)
    assert size_of(out / "grid.png") == (2 * 66 + 2, 2 * 66 + 2)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_run_begins_with_a_picture_as_python_does_with_its_samples(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, first, second = str(bundles["cached"].path), tmp_path / "first", tmp_path / "second"
    assert run(["run", bundle, "--labels", "3", "-o", str(first)]) == 0
    picture = first / "0000-class3.png"
    capsys.readouterr()
    line = [
        "run",
        bundle,
        "--labels",
        "0,4",
        "--seed",
        "5",
        "--from",
        str(picture),
        "--strength",
        "0.7",
        "--batch",
        "1",
    ]
    assert run([*line, "-o", str(second)]) == 0
    assert f"began with {picture} at step 2\n" in capsys.readouterr().out
    finished = np.moveaxis(pixels_of(picture), -1, 0)[None].repeat(2, 0) / np.float32(127.5) - 1
    with load(bundle) as pipe:
        images = pipe.images([0, 4], latents=pipe.noised(finished, start=2, seed=5), start=2, seed=5)
    for name, image in zip(("0000-class0.png", "0001-class4.png"), images, strict=True):
        assert np.array_equal(pixels_of(second / name), np.moveaxis(to_bytes(image), 0, -1))
        with Image.open(second / name) as opened:
            said = opened.text  # type: ignore[attr-defined]
        assert (said["ditc.from"], said["ditc.start"]) == (sha256_of(picture), "2")
    assert run([*line, "-o", str(second), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["start"] == 2
    assert [step["index"] for step in printed["steps"]] == 2 * [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cached", ["--strength", "0.5"], "--strength 0.5 is of a picture to begin with; name it with --from FILE"),
        (
            "cached",
            ["--from", "{grid}"],
            "is a picture of 10 x 10 pixels, mode RGB, and small works on 8 x 8, mode RGB",
        ),
        ("cached", ["--from", "{none}"], "can't read {none}: No such file or directory; give a picture, or an .npy"),
        ("cached", ["--from", "{own}", "--strength", "2"], "--strength must be above 0 and at most 1, found 2"),
        ("memory-none", ["--from", "{own}"], "begins with step 2 of 6, and this bundle can't: the sampler looks back"),
    ],
)
def test_what_run_can_not_begin_with_is_refused_before_anything_is_written(
    name: str,
    given: list[str],
    message: str,
    bundles: dict[str, Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {file: str(tmp_path / f"{file}.png") for file in ("grid", "none", "own")}
    for file, side in (("grid", 10), ("own", 8)):
        Image.new("RGB", (side, side)).save(places[file])
    line = [part.format(**places) for part in given]
    assert run(["run", str(bundles[name].path), "--labels", "1", "-o", str(tmp_path / "out"), *line]) == 2
    said = capsys.readouterr().err
    assert message.format(**places) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("cached", ("full: 8 of 8 linear layers", "blocks.0.attn  #.#.#.", "segments/full.onnx", '"fora:2"')),
        (
            "float-ends",
            (
                "6 steps, 3 computed (2 of them in floating point), guidance 1.5",
                "schedule (# computed, f computed in floating point, . reused)",
                "blocks.0.attn  f.#.f.",
            ),
        ),
    ],
)
def test_inspect_shows_program_schedule_and_settings(
    name: str, texts: tuple[str, ...], bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(bundles[name].path)]) == 0
    shown = capsys.readouterr().out
    assert [text for text in texts if text not in shown] == []


def test_inspect_says_how_scales_are_bound(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("cached", "static scales"), ("per-step", "per-step scales, 3 for each of 8 tensors, up to")):
        assert run(["inspect", str(bundles[name].path)]) == 0
        assert text in capsys.readouterr().out


def test_inspect_json_is_the_manifest(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundles["cached"].path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["program"]["slots"] == 1


def test_verify_of_an_uncached_fp_bundle_finds_no_difference(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(bundles["fp32-none"].path), "--images", "2", "--json"]) == 0
    assert max(json.loads(capsys.readouterr().out)["relative_error"]) == 0


def test_verify_fails_below_the_quality_asked_for(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(bundles["cached"].path), "--images", "1", "--min-psnr", "200"]) == 1
    assert "check failed: mean PSNR against FP is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exactness", "words"),
    [
        (Exactness(8), "INT8 on this CPU: exact as it is"),
        (Exactness(7, 8), "INT8 on this CPU: exact with unsigned weights, which is slower"),
        (None, ""),
    ],
)
def test_the_demo_says_in_which_form_integers_ran(
    exactness: Exactness | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = {"frechet_distance": 1, "frechet_distance_classifier": 1, "class_agreement": 1, "size_bytes": 1}
    demo = Demo(
        grid="",
        bundle="",
        seconds_per_image={},
        arithmetic=None if exactness is None else Arithmetic.of(exactness, 8),
        images=1,
        torch=TorchSide(**quality),
        compiled=BundleSide(**quality, psnr_db=1),
        settings={},
    )
    print_demo(demo)
    printed = capsys.readouterr().out
    assert words in printed
    assert ("INT8" in printed) == bool(words)


def test_numbers_that_are_none_are_printed_as_python_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"psnr_db_mean": math.nan, "psnr_db_min": -math.inf, "relative_error": (math.inf,), "std_ratio": ()}
    print_record(Verification(images=1, **numbers))
    printed = json.loads(capsys.readouterr().out)
    assert math.isnan(printed.pop("psnr_db_mean"))
    assert printed == {"images": 1, "psnr_db_min": -math.inf, "relative_error": [math.inf], "std_ratio": []}


def test_advice_is_one_line_on_stderr_and_json_stays_json(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of 8-bit weights on a machine whose exact form for them is a slower one."""
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: Exactness(7, 8))
    advise.cache_clear()
    command = f"run {bundles['cached'].path} --labels 1,2 -o {tmp_path} --json"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert [run(command.split()), run(command.split())] == [0, 0]
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("ditc: INT8 products with 8-bit weights would saturate on this CPU")
    assert line.endswith("compile with --precision w7a8, which is exact here and faster")


def test_warnings_that_are_not_ours_are_shown_as_ever() -> None:
    with pytest.warns(UserWarning, match="something else"), advice_on_stderr():
        warnings.warn("something else", UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("arguments", "begin", "command"),
    [
        ("run B --labels 1 -o o --threads x", "Invalid value for '--threads': 'x' is not a valid integer;", "ditc run"),
        ("run B", "Missing option '-o' / '--out';", "ditc run"),
        ("inspect", "Missing argument 'BUNDLE';", "ditc inspect"),
        ("inspect B --wrong", "No such option", "ditc inspect"),
        ("improve", "No such command 'improve'", "ditc"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(
    arguments: str, begin: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ditc: {begin}")
    assert said.endswith(f"; `{command} --help` lists what it takes\n")
    assert said.count("\n") == 1


def test_a_seed_that_is_none_leaves_no_folder(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"run {bundles['cached'].path} --labels 1 --seed -1 -o {tmp_path / 'o'}"
    assert run(command.split()) == 2
    assert "--seed must be at least 0, found -1" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


PATHS = [
    (name, parameter)
    for name, command in sorted(cli.commands.items())
    for parameter in command.params
    if isinstance(parameter.type, click.Path)
]


@pytest.mark.parametrize(("name", "parameter"), PATHS, ids=lambda value: getattr(value, "name", value))
def test_an_empty_path_is_not_the_working_directory(
    name: str, parameter: click.Parameter, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [""] if isinstance(parameter, click.Argument) else [parameter.opts[0], ""]
    others = [] if isinstance(parameter, click.Argument) else ["x"]
    assert run([name, *others, *given]) == 2
    assert "is empty; name a file or folder" in capsys.readouterr().err


def test_doctor_says_what_works_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["target cpu"]["works"]
    assert "INT8 exact" in findings["target cpu"]["detail"]
    assert not findings["target tensorrt"]["works"]
    assert "TensorRT can't be imported" in findings["target tensorrt"]["detail"]


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """One file or folder for every way a model or bundle can be wrong."""
    (tmp_path / "truncated.pt").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print))
    torch.save({"something.else": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compile {bad}/missing.pt -o {bad}/b", "no such checkpoint"),
        ("compile {bad}/truncated.pt -o {bad}/b", "not a whole torch checkpoint"),
        ("compile {bad}/evil.pt -o {bad}/b", "pickle"),
        ("compile {bad}/foreign.pt -o {bad}/b", "x_embedder.proj.weight is missing"),
        ("compile {bad}/empty -o {bad}/b", "no such file"),
        ("compile nosuch.module:build -o {bad}/b", "can't import nosuch.module:build"),
        ("compile -o {bad}/b", "name one model"),
        ("compile digits --random dit-s-2-256 -o {bad}/b", "name one model"),
        ("compile --random dit-xxl-2-256 -o {bad}/b", "unknown size"),
        ("compile digits -o {bad}/b --policy toca", "unknown policy 'toca'; choose one of: FILE.json, dps, fora, l2c"),
        ("compile digits -o {bad}/b --policy fora:0", "interval N >= 1"),
        ("compile digits -o {bad}/b --policy {bad}/broken.json", "is not a schedule"),
        ("compile digits -o {bad}/b --steps 1", "--steps must be at least 2"),
        ("compile digits -o {bad}/b --select best", "unknown --select 'best'"),
        (
            "compile digits -o {bad}/b --scales often",
            "'often'; choose one of: dynamic, per-step, static",
        ),
        ("compile digits -o {bad}/b --scales per-step --precision fp16", "--precision fp16 has none; leave it out"),
        ("compile digits -o {bad}/b --midpoint low", "unknown --midpoint 'low'; choose one of: bounded, zero"),
        (
            "compile digits -o {bad}/b --midpoint bounded --precision fp32",
            "--midpoint bounded is for activations",
        ),
        ("compile digits -o {bad}/b --scales dynamic --midpoint bounded", "leave one of them out"),
        ("compile digits -o {bad}/b --precision w8a6 --scales per-step", "simulated with --scales static only"),
        ("compile digits -o {bad}/b --precision w2a8", "choose one of: fp16, fp32, w4a8, w7a8, w8a6, w8a8"),
        ("compile digits -o {bad}/b --batch 0", "--batch must be at least 1"),
        ("compile digits -o {bad}/b --seed -1", "--seed must be at least 0 and below 2147483648, found -1"),
        ("compile digits -o {bad}/b --seed 5000000000", "--seed must be at least 0 and below 2147483648, found"),
        ("verify {bad} --min-psnr nan", "--min-psnr must be a finite number, found nan"),
        ("compile digits -o {bad}/b --tap-tau nan", "--tap-tau must be a finite number, found nan"),
        ("compile digits -o {bad}/b --clip inf", "--clip must be a finite number, found inf"),
        ("compile digits -o {bad}/b --pool 0", "--pool must be at least 1, found 0"),
        ("compile digits -o {bad}/b --cfg 2000", "--cfg must be above 0 and below 1000"),
        ("compile digits -o {bad}/b --pool 1 --points 800", "the pool will have 17 points, fewer than the 800"),
        ("run {bad}/empty --labels 1 -o {bad}/i", "is not a bundle"),
        ("run {bad}/broken.json --labels 1 -o {bad}/i", "is a file, expected the folder"),
        ("run {bundle} --labels 9 -o {bad}/i", "label 9 is not a class"),
        ("run {bundle} --labels a,b -o {bad}/i", "--labels must be whole numbers"),
        (
            "tune digits -o {bad}/b --worse-by 1 --intervals two",
            "with commas between, like 2,3,4,5,6,8,10; found 'two'",
        ),
        ("verify {bundle} --images 0", "--images must be at least 1"),
        ("inspect {bad}/nowhere", "is not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, bad_files: Path, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    filled = arguments.format(bad=bad_files, bundle=bundles["cached"].path).split()
    assert run(filled) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (bad_files / "b").exists()
    assert not (bad_files / "i").exists()


def test_a_bundle_with_a_changed_byte_is_refused_naming_the_file(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundles["cached"].path, tmp_path / "b")
    weights = tmp_path / "b" / "segments" / "full.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert run(["run", str(tmp_path / "b"), "--labels", "1", "-o", str(tmp_path / "i")]) == 2
    assert "segments/full.onnx.data does not match" in capsys.readouterr().err


def test_a_bundle_from_a_newer_schema_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundles["cached"].path, tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    (tmp_path / "b" / "manifest.sha256").write_text(f"{sha256_of(manifest)}\n")
    assert run(["inspect", str(tmp_path / "b")]) == 2
    assert "schema 99, this ditc reads up to 1; update ditc" in capsys.readouterr().err


def test_bad_usage_is_exit_code_2_under_the_oldest_click() -> None:
    """Releases before 8.2 have no error for help that was printed."""
    code = "import click.exceptions\ndel click.exceptions.NoArgsIsHelpError\n"
    code += "import sys\nfrom ditc.cli.main import run\nsys.exit(run(['zzz']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "ditc: No such command 'zzz'; `ditc --help` lists what it takes\n")


def test_bad_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "digits"]) == 2
    assert "Missing option" in capsys.readouterr().err
