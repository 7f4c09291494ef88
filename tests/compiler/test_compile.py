"""Compiling: same bytes for the same inputs, resume after an interruption, nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditc
from ditc.bundle import Bundle, open_bundle
from ditc.compiler import driver, planning, pooling, quantizing
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.errors import CheckError, InputError
from ditc.exporter.dit import DiT
from tests.models.two_streams import dual

QUICK_FLAGS = "--steps 6 --policy fora:2 --points 24 --pool 24 --vc-images 8 --verify-images 4 --heads 4".split()

NOTES = ("assumed: ", "warning: ")  # about the model, printed before the work begins


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ditc.exporter.dit import DiTConfig

    torch.manual_seed(0)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    torch.save(DiT(config).state_dict(), path)
    return path


def file_hashes(bundle: Bundle) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items()}


def ditc_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ditc.cli", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_the_same_inputs_and_seed_give_the_same_bytes(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions, bundles: dict[str, Bundle]
) -> None:
    again = compile_model(make_small_model(), tmp_path / "again", quick_options.model_copy(update={"policy": "fora:2"}))
    assert file_hashes(again) == file_hashes(bundles["cached"])
    assert (again.path / "manifest.json").read_bytes() == (bundles["cached"].path / "manifest.json").read_bytes()


def test_a_model_of_two_streams_gives_the_same_bytes_again(
    tmp_path: Path, quick_options: CompileOptions, bundles: dict[str, Bundle]
) -> None:
    options = quick_options.model_copy(update={"policy": "fora:2", "smooth": "smooth"})
    again = compile_model(dual().eval(), tmp_path / "again", options)
    assert file_hashes(again) == file_hashes(bundles["streams"])


def test_another_seed_gives_another_calibration_set(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    bundles: dict[str, Bundle],
    exports: Path,
) -> None:
    options = quick_options.model_copy(update={"policy": "fora:2", "seed": 1})
    other = compile_model(make_small_model(), tmp_path / "other", options, exports=exports)
    assert file_hashes(other)["calib/calib.npz"] != file_hashes(bundles["cached"])["calib/calib.npz"]


def test_an_interrupted_compile_resumes_after_its_last_whole_stage(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    monkeypatch: pytest.MonkeyPatch,
    bundles: dict[str, Bundle],
    exports: Path,
) -> None:
    options, whole = quick_options.model_copy(update={"policy": "fora:2"}), file_hashes(bundles["cached"])
    with monkeypatch.context() as patch:
        patch.setattr(driver, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compile_model(make_small_model(), tmp_path / "b", options, exports=exports)
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(driver, "export", lambda *_: pytest.fail("exported again"))
    monkeypatch.setattr(driver, "quantize", lambda *_: pytest.fail("quantized again"))
    resumed = compile_model(make_small_model(), tmp_path / "b", options)
    assert file_hashes(resumed) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_changed_settings_do_not_resume_stale_stages(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = quick_options.model_copy(update={"policy": "fora:2"})
    monkeypatch.setattr(driver, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compile_model(make_small_model(), tmp_path / "b", options, exports=exports)
    ran = []
    quantize = driver.quantize
    monkeypatch.setattr(driver, "quantize", lambda *a: (ran.append("quantize"), quantize(*a)))
    with pytest.raises(KeyboardInterrupt):
        compile_model(make_small_model(), tmp_path / "b", options.model_copy(update={"ranges": "max"}))
    assert ran == ["quantize"]


def test_another_number_of_heads_does_not_resume_the_old_export(
    checkpoint: Path,
    tmp_path: Path,
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pooling, "record_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compile_model(str(checkpoint), tmp_path / "b", quick_options, num_heads=4, exports=exports)
    exported = []
    export = driver.export
    monkeypatch.setattr(driver, "export", lambda *a: (exported.append("export"), export(*a)))
    compile_model(str(checkpoint), tmp_path / "b", quick_options, num_heads=8)
    assert exported == ["export"]


# the command line, but its stage `quantize` begins and never ends
STUCK = """
import sys, time
from ditc.compiler import driver
from ditc.cli.main import run

def stuck(*_):
    print("quantize: begun", file=sys.stderr, flush=True)
    time.sleep(600)

driver.quantize = stuck
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_compile_leaves_no_bundle_and_the_next_one_resumes(
    tmp_path: Path, checkpoint: Path, exports: Path, kill: signal.Signals, code: int
) -> None:
    out = tmp_path / "bundle"
    arguments = ["compile", str(checkpoint), "-o", str(out), *QUICK_FLAGS]
    command = [sys.executable, "-c", STUCK, *arguments, "--exports", str(exports)]
    seen = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            seen.append(line)
            if line.startswith("quantize: begun"):
                child.send_signal(kill)
                break
        seen += child.stderr.readlines()
    assert child.returncode == code
    assert "Traceback" not in "".join(seen)
    assert not out.exists()
    done = ditc_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "export (kept from an earlier run)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with ditc.load(out) as pipe:
        assert pipe.images([0, 1]).shape == (2, 3, 8, 8)
    settings = open_bundle(out).manifest.settings  # what was taken where nothing was asked for
    assert [settings[name] for name in ("reuse", "smooth", "vc")] == ["taylor", "smooth", "none"]


def test_compiles_of_one_model_share_what_they_export(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exports, exported, alone = tmp_path / "exports", [], file_hashes(bundles["cached"])
    export = driver.export
    monkeypatch.setattr(driver, "export", lambda *given: (exported.append(given), export(*given)))
    for name, changes in (
        ("first", {"policy": "fora:2", "precision": "fp32", "vc": "none"}),
        ("second", {"policy": "fora:2"}),
        ("other", {"policy": "fora:3"}),
    ):
        compile_model(make_small_model(), tmp_path / name, quick_options.model_copy(update=changes), exports=exports)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)  # what is shared belongs to no bundle
    assert len(exported) == 2
    assert len(list(exports.glob("export-*"))) == 2
    assert file_hashes(open_bundle(tmp_path / "second")) == alone


@pytest.mark.parametrize("place", ["b", "b/exports"])
def test_exports_inside_the_bundle_are_refused(
    place: str, tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    with pytest.raises(InputError, match=r"lies in the bundle .* choose a folder beside it"):
        compile_model(make_small_model(), tmp_path / "b", quick_options, exports=tmp_path / place)
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_is_not_kept(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object, model: object, folder: Path) -> None:
        (folder / "condition.onnx").write_bytes(b"half")
        raise CheckError("played")

    with monkeypatch.context() as broken:
        broken.setattr(driver, "export", fail)
        with pytest.raises(CheckError, match="played"):
            compile_model(make_small_model(), tmp_path / "b", quick_options, exports=tmp_path / "exports")
    assert not list((tmp_path / "exports").glob("[!.]*"))
    assert not (tmp_path / "b").exists()


def test_two_compiles_of_one_bundle_do_not_mix(tmp_path: Path, make_small_model: Callable[[], DiT]) -> None:
    from ditc.compiler.work import work_folder

    with work_folder(tmp_path / "b"), pytest.raises(InputError, match="another compile is writing"):
        compile_model(make_small_model(), tmp_path / "b")


def test_an_existing_folder_is_kept_unless_forced(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    bundles: dict[str, Bundle],
    quick_options: CompileOptions,
    exports: Path,
) -> None:
    target = tmp_path / "b"
    shutil.copytree(bundles["fp32-none"].path, target)
    with pytest.raises(InputError, match="exists already"):
        compile_model(make_small_model(), target, quick_options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a bundle"):
        compile_model(make_small_model(), tmp_path / "mine", quick_options, force=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    options = quick_options.model_copy(update={"policy": "none", "precision": "fp32", "vc": "none", "seed": 4})
    replaced = compile_model(make_small_model(), target, options, force=True, exports=exports)
    assert replaced.manifest.settings["seed"] == 4


def test_a_relative_output_folder_is_the_one_meant(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"policy": "none", "precision": "fp32", "vc": "none"}
    compile_model(make_small_model(), "inner/../b", quick_options.model_copy(update=changes), exports=exports)
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_a_failed_check_leaves_no_bundle(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantizing, "insert_qdq", lambda model, table: False)
    with pytest.raises(CheckError, match="0 of 8 linear layers"):
        compile_model(make_small_model(), tmp_path / "b", quick_options, exports=exports)
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_one_line_and_leaves_no_bundle(tmp_path: Path, checkpoint: Path) -> None:
    """A file size limit stands in for a full disk: every write beyond it fails in the same place."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from ditc.cli.main import run\n"
        f"sys.exit(run(['compile', {str(checkpoint)!r}, '-o', {str(tmp_path / 'b')!r}, *{QUICK_FLAGS!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *before, line = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert line.startswith("ditc: can't write"), done.stderr
    assert all(other.endswith(": done") or other.startswith(NOTES) for other in before), done.stderr
    assert not (tmp_path / "b").exists()


def test_an_output_folder_that_can_not_be_made_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = ditc_command("compile", str(checkpoint), "-o", str(tmp_path / "file" / "b"), *QUICK_FLAGS)
    assert done.returncode == 2
    *notes, line = done.stderr.splitlines()
    assert line.startswith("ditc: can't write")
    assert all(note.startswith(NOTES) for note in notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    tmp_path.chmod(0o555)
    done = ditc_command("compile", str(checkpoint), "-o", str(tmp_path / "b"), *QUICK_FLAGS)
    assert done.returncode == 2
    assert "can't write" in done.stderr


def test_the_reference_can_be_left_out(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions, exports: Path
) -> None:
    options = quick_options.model_copy(update={"reference": False})
    bundle = compile_model(make_small_model(), tmp_path / "b", options, exports=exports)
    assert not (bundle.path / "reference").exists()
    with pytest.raises(InputError, match="without its FP reference"):
        ditc.load(bundle.path, reference=True)


def test_calibration_points_come_from_steps_that_compute(bundles: dict[str, Bundle]) -> None:
    from ditc.calibset import CalibSet

    calib = CalibSet.load(bundles["cached"].path / "calib" / "calib.npz")
    assert len(calib) == 24
    assert set(calib.step) == {0, 2, 4}


def test_steps_in_floating_point_calibrate_nothing_and_have_fp_weights(bundles: dict[str, Bundle]) -> None:
    from ditc.calibset import CalibSet

    bundle = bundles["float-ends"]
    assert [step.segment for step in bundle.manifest.program.steps] == [
        "float",
        "reuse",
        "full",
        "reuse",
        "float",
        "reuse",
    ]
    assert set(CalibSet.load(bundle.path / "calib" / "calib.npz").step) == {2}
    files = bundle.manifest.files
    assert files["segments/float.onnx.data"].sha256 == files["reference/full.onnx.data"].sha256
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}


def test_the_compiled_program_stays_near_the_fp_program(bundles: dict[str, Bundle]) -> None:
    """Same schedule, FP against INT8, before anything diverges: the first step alone."""
    with ditc.load(bundles["cached"].path) as int8, ditc.load(bundles["fp32-cached"].path) as fp:
        first = [next(iter(pipe.generate([0, 1, 2, 3], seed=0))) for pipe in (int8, fp)]
    error = np.linalg.norm(first[0].x - first[1].x) / np.linalg.norm(first[1].x)
    assert 0 < error < 0.02


def test_settings_in_the_manifest_are_complete(bundles: dict[str, Bundle]) -> None:
    settings = bundles["cached"].manifest.settings
    assert set(settings) == set(CompileOptions.model_fields) - {
        "correct",
        "rotate",
        "shift",
        "sigmas",
        "time_groups",
        "watch_images",
    }  # nothing asked for these
    sampler = settings["sampler"]
    assert isinstance(sampler, dict)
    assert sampler["name"] == "ddim"


def test_guidance_needs_an_unconditional_class(
    make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    class Unguided:
        decoder = None
        spec = make_small_model().spec.model_copy(update={"null_label": None})

    with pytest.raises(InputError, match="set --cfg 1"):
        planning.make_plan(Unguided(), quick_options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "w2a2"}, "unknown --precision 'w2a2'; choose one of: fp16, fp32, w4a8, w7a8, w8a6, w8a8"),
        ({"ranges": "p99"}, "unknown --ranges 'p99'; choose one of: entropy, fisher, max, mse, percentile"),
        ({"select": "best"}, "unknown --select 'best'"),
        ({"vc": "magic"}, "unknown --vc 'magic'"),
        ({"target": "abacus"}, "unknown --target 'abacus'"),
        ({"policy": "fora:0"}, "interval N >= 1"),
        ({"policy": "toca"}, "unknown policy 'toca'"),
        ({"steps": 1}, "--steps must be at least 2, found 1"),
        ({"steps": 2000}, "steps must be 2 to 1000"),
        ({"batch": 0}, "--batch must be at least 1, found 0"),
        ({"cfg": -1.0}, "--cfg must be above 0"),
        ({"points": 10_000, "pool_images": 2}, "the pool will have 4 points, fewer than the 10000"),
        ({"tap_alpha": 2.0}, "--tap-alpha must be at least 0 and at most 1"),
        ({"clusters": 50}, "clusters must be 1 to 24"),
        ({"eta": 3.0}, "--eta must be at least 0 and at most 1"),
        ({"sampler": "heun"}, "unknown --sampler 'heun'"),
        ({"float_steps": "2"}, "--float-steps needs FIRST:LAST, found '2'; write for example --float-steps 2:2"),
        ({"float_steps": f"{'9' * 5000}:0"}, "--float-steps needs FIRST:LAST"),
        ({"float_steps": "0:0"}, "--float-steps needs FIRST:LAST, found '0:0'"),
        ({"float_steps": "1:1", "precision": "fp16"}, "and --precision fp16 quantizes none; leave it out"),
        ({"float_steps": "5:1", "policy": "none"}, "leaves no step that computes everything to quantize"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        compile_model(make_small_model(), tmp_path / "b", quick_options.model_copy(update=change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_opening_what_was_compiled_equals_what_was_returned(bundles: dict[str, Bundle]) -> None:
    assert open_bundle(bundles["cached"].path).manifest == bundles["cached"].manifest
