"""Assumptions about a model, and what speaks against it: printed once, kept in the bundle, shown by inspect."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ditc
from ditc.bundle import Bundle, Manifest
from ditc.cli.main import run
from ditc.compiler import driver
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.errors import DoubtWarning, InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.models import load_model
from ditc.quality import candidates, tuning
from ditc.quality.options import TuneOptions
from ditc.quality.search import Trial

QUICK = ["--steps", "4", "--precision", "fp32", "--vc", "none", "--verify-images", "1"]
HEADS = "6 attention heads, as the released DiT of width 384 has (--heads)"
CLASSES = "4 classes and a null class, from 5 label rows (--classes, --no-null)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6, num_classes=4, in_channels=3))
    path = tmp_path_factory.mktemp("checkpoint") / "mine.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle of it, and the notes that were handed on."""
    notes: list[str] = []
    options = CompileOptions(steps=4, precision="fp32", vc="none", verify_images=1)
    bundle = compile_model(str(checkpoint), tmp_path_factory.mktemp("out") / "b", options, on_note=notes.append)
    return bundle.path, notes


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile ends when its model is read and the notes are said."""

    def stop(*_: Any, **__: Any) -> None:
        raise InputError("stopped here")

    monkeypatch.setattr(driver, "make_plan", stop)


def notes_of(arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a compile that is stopped, and return what it prints on stderr before that."""
    assert run(["compile", *arguments.split(), "-o", str(tmp_path / "b")]) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert last == "ditc: stopped here"
    return notes


def lines_of(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(word)]


def test_each_assumption_and_doubt_is_handed_on_once(compiled: tuple[Path, list[str]]) -> None:
    _, notes = compiled
    assert notes[:2] == [f"assumed: {HEADS}", f"assumed: {CLASSES}"]
    assert notes[2].startswith("assumed: a process as usual: noise prediction (--prediction)")
    assert notes[3].startswith("warning: given noise at the largest timestep")
    assert len(notes) == 4


@pytest.mark.usefixtures("stopping")
def test_compile_prints_them_on_stderr_before_anything_else(
    checkpoint: Path, compiled: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert notes_of(f"{checkpoint} --json", tmp_path, capsys) == compiled[1]


@pytest.mark.usefixtures("stopping")
def test_what_is_stated_is_not_printed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = "--heads 6 --classes 4 --prediction epsilon --beta-schedule linear:1e-4:0.02 --train-steps 1000"
    assert lines_of("\n".join(notes_of(f"{checkpoint} {stated}", tmp_path, capsys)), "assumed") == []


def test_inspect_shows_them(compiled: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    path, notes = compiled
    assert run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "of the model\n" + "".join(f"  {note}\n" for note in notes) in shown
    assert run(["inspect", str(path), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert [f"assumed: {line}" for line in model["assumptions"]] == notes[:3]
    assert [f"warning: {line}" for line in model["doubts"]] == notes[3:]


def test_of_a_model_that_states_everything_nothing_is_said(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(bundles["fp32-none"].path)]) == 0
    assert "of the model" not in capsys.readouterr().out
    assert load_model("digits").spec.assumptions == ()


def test_a_bundle_from_before_there_were_notes_opens(bundles: dict[str, Bundle]) -> None:
    manifest = json.loads((bundles["fp32-none"].path / "manifest.json").read_text())
    for name in ("assumptions", "doubts", "latent_shift"):
        del manifest["model"][name]
    assert Manifest.model_validate(manifest).model.assumptions == ()


@pytest.mark.usefixtures("stopping")
def test_from_python_a_doubt_is_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    with (
        pytest.warns(DoubtWarning, match="mine: given noise at the largest timestep"),
        pytest.raises(InputError, match="stopped here"),
    ):
        compile_model(str(checkpoint), tmp_path / "b")


@pytest.mark.usefixtures("stopping")
def test_trained_weights_in_a_file_are_compiled_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = notes_of(f"{files('ditc.exporter') / 'digits.safetensors'} --heads 4", tmp_path, capsys)
    assert [note.split(":")[0] for note in notes] == ["assumed", "assumed"]
    assert notes[0] == "assumed: 10 classes and a null class, from 11 label rows (--classes, --no-null)"


@pytest.mark.usefixtures("stopping")
def test_negated_weights_in_a_file_are_compiled_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(str(files("ditc.exporter") / "digits.safetensors"))
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[key] = -tensors[key]
    save_file(tensors, tmp_path / "negated.safetensors")
    notes = notes_of(f"{tmp_path}/negated.safetensors --heads 4", tmp_path, capsys)
    (line,) = lines_of("\n".join(notes), "warning")
    assert "(--prediction)" in line
    assert "flow matching" in line


def one_row(folder: Path) -> Path:
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6, num_classes=1, null_class=False))
    torch.save(model.state_dict(), folder / "one.pt")
    return folder / "one.pt"


def test_a_model_of_one_class_is_compiled_without_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(one_row(tmp_path)), "-o", str(tmp_path / "b"), *QUICK]
    assert run(arguments) == 2
    assert "say so with --no-null" in capsys.readouterr().err
    assert run([*arguments, "--no-null"]) == 2
    assert "one has no unconditional class for guidance; set --cfg 1" in capsys.readouterr().err
    assert run([*arguments, "--no-null", "--cfg", "1"]) == 0
    with ditc.load(tmp_path / "b") as pipe:
        assert pipe.bundle.manifest.model.null_label is None
        assert pipe.latents([0, 0]).shape == (2, 4, 4, 4)
    torch_peer = ["bench", str(tmp_path / "b"), "--requests", "1", "--warmup", "0", "--against", "torch-f32"]
    assert run([*torch_peer, "--model", str(tmp_path / "one.pt"), "--json"]) == 0
    captured = capsys.readouterr().out
    assert "torch-f32" in json.loads(captured[captured.index("{") :])["against"]["peers"]


def test_the_last_class_of_a_model_without_a_null_class_is_a_class(checkpoint: Path) -> None:
    load_model(str(checkpoint), facts=ditc.ModelFacts(classes=5)).spec.check_labels((4,))
    with pytest.raises(InputError, match="label 4 is not a class of mine"):
        load_model(str(checkpoint)).spec.check_labels((4,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits --heads 4", "digits states its heads, classes and process itself; leave out --heads"),
        ("digits --vae nowhere", "digits makes images itself; leave out --vae"),
        ("digits --no-null --prediction v", "leave out --no-null and --prediction"),
        ("--random dit-s-8-256 --classes 10", "leave out --classes"),
        ("{file} --prediction noise", "unknown --prediction 'noise'; choose one of: epsilon, flow, sample, v"),
        ("{file} --beta-schedule cosine", "unknown beta schedule 'cosine'"),
        ("{file} --beta-schedule linear:1", "NAME or NAME:START:END, found 'linear:1'"),
        ("{file} --beta-schedule linear:0.5:0.1", "0 < START <= END < 1, found 0.5 and 0.1"),
        ("{file} --train-steps 1", "--train-steps must be a whole number from 2 to 65536"),
        ("{file} --classes 7", "its label table has 5 rows, the options say 7 classes"),
        ("{file} --heads 5", "which 5 heads don't divide"),
        ("{file} --vae nowhere", "there is no such folder"),
        ("facebook/DiT-XL-2-256", "nothing is downloaded"),
    ],
)
def test_a_fact_that_can_not_be_is_one_line_and_exit_code_2(
    arguments: str, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = arguments.format(file=checkpoint).split()
    assert run(["compile", *filled, "-o", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("stated", [{"num_heads": 4}, {"vae": "somewhere"}, {"facts": ditc.ModelFacts(classes=3)}])
def test_a_model_object_is_told_nothing(stated: dict[str, Any], tmp_path: Path, make_small_model: Any) -> None:
    with pytest.raises(InputError, match=f"{next(iter(stated))} would change nothing"):
        compile_model(make_small_model(), tmp_path / "b", CompileOptions(), **stated)


@pytest.mark.usefixtures("stopping")
def test_tune_takes_the_same_options(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"tune {checkpoint} --no-null --heads 6 --prediction v --least-psnr 1 -o {tmp_path / 'b'}".split()
    assert run(arguments) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert [note.split(":")[0] for note in notes] == ["assumed"]
    assert "noise prediction" not in notes[0]
    assert last == "ditc: stopped here"


def test_tune_says_each_thing_once_and_reads_every_candidate_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, notes = [], []

    def compiled(model: str, *_: Any, on_note: Any, facts: Any, num_heads: Any, vae: Any, **__: Any) -> None:
        on_note("assumed: something")
        read.append((model, facts, num_heads, vae))

    def judged(_: Any, stage: str, changes: dict[str, str], *__: Any) -> Trial:
        numbers = dict.fromkeys(("seconds", "psnr_db", "psnr_low"), 30.0)
        return Trial(stage=stage, changes=changes, worse_by=None, worse_high=None, size_bytes=1, within=True, **numbers)

    monkeypatch.setattr(candidates, "compile_model", compiled)
    monkeypatch.setattr(candidates, "trial_of", judged)
    facts = ditc.ModelFacts(null_class=False)
    options = TuneOptions(least_psnr_db=1, intervals=(2, 3))
    base = CompileOptions(precision="fp32", cfg=1)
    tuning.tune_model("a.pt", tmp_path / "b", base, options, on_note=notes.append, facts=facts, num_heads=3, vae="v")
    assert notes == ["assumed: something"]
    assert len(read) > 5
    assert set(read) == {("a.pt", facts, 3, "v")}
