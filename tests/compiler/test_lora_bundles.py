"""Bundles with LoRAs: bit for bit those of weights that were merged by hand, and they say what went in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler import driver
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.errors import DoubtWarning, InputError
from ditc.exporter.dit import DiTConfig
from ditc.exporter.models import load_model, random_dit
from ditc.files import sha256_of
from ditc.loras import Lora
from ditc.quality import candidates, tuning
from ditc.quality.options import TuneOptions
from ditc.quality.search import Trial
from tests.models.loras import RANK, kohya, pairs_for, peft, write

OPTIONS = CompileOptions(
    steps=4, policy="fora:2", points=8, pool_images=8, vc="none", verify_images=1, precision="w8a8"
)
PLAIN = OPTIONS.model_copy(update={"precision": "fp32"})
LAYERS = ["x_embedder.proj", "blocks.0.attn.qkv", "blocks.0.adaLN_modulation.1", "blocks.1.mlp.fc1", "t_embedder.mlp.2"]
FACTS = ditc.ModelFacts(
    classes=4, prediction="epsilon", beta_schedule="linear", beta_range=(1e-4, 2e-2), train_steps=1000
)
CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, two LoRAs for it, and the checkpoint with the first one merged by hand."""
    home = tmp_path_factory.mktemp("loras")
    model = random_dit(CONFIG, "mine")
    torch.save(model.state_dict(), home / "mine.pt")
    pairs = pairs_for(model, LAYERS, size=0.01)
    write(home / "style.safetensors", kohya(pairs, 2.0 * RANK))
    write(home / "other.safetensors", peft(pairs_for(model, LAYERS[1:3], seed=5)), lora_alpha=RANK)
    weights = model.state_dict()
    for name, (down, up) in pairs.items():
        key = f"{name}.weight"
        change = 0.8 * 2.0 * (up.double().flatten(1) @ down.double().flatten(1)).reshape(weights[key].shape)
        weights[key] = (weights[key].double() + change).float()
    (home / "by-hand").mkdir()
    torch.save(weights, home / "by-hand" / "mine.pt")
    return home


def compiled(home: Path, out: Path, *loras: str, model: str = "mine.pt", **more: Any) -> Bundle:
    reading = {"num_heads": 4, "facts": FACTS, "on_note": lambda _: None, "options": OPTIONS} | more
    return compile_model(str(home / model), out, loras=[f"{home}/{lora}" for lora in loras], **reading)


@pytest.fixture(scope="module")
def merged(home: Path) -> Bundle:
    """A bundle with a LoRA, whose exports lie beside those of others."""
    return compiled(home, home / "merged", "style.safetensors:0.8", exports=home / "exports")


@pytest.fixture(scope="module")
def by_hand(home: Path) -> Bundle:
    return compiled(home, home / "hand", model="by-hand/mine.pt")


def graphs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.onnx*")}


def content(bundle: Bundle) -> dict[str, str]:
    """The hash of every file of a bundle but its manifest."""
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items()}


def test_a_bundle_is_that_of_weights_merged_by_hand_bit_for_bit(merged: Bundle, by_hand: Bundle) -> None:
    assert content(merged) == content(by_hand)
    assert "segments/full.onnx" in content(merged)
    assert merged.manifest.model == by_hand.manifest.model.model_copy(update={"loras": merged.manifest.model.loras})
    assert merged.manifest.checks == by_hand.manifest.checks


def test_the_manifest_and_inspect_say_which_went_in(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    loras = ("style.safetensors:-0.5", "other.safetensors")
    bundle = compiled(home, tmp_path / "b", *loras, options=PLAIN, on_note=notes.append)
    digests = [sha256_of(home / f"{name}.safetensors") for name in ("style", "other")]
    written = json.loads((bundle.path / "manifest.json").read_text())["model"]["loras"]
    assert written == [
        {"file": "style.safetensors", "sha256": digests[0], "weight": -0.5, "layers": 5},
        {"file": "other.safetensors", "sha256": digests[1], "weight": 1.0, "layers": 2},
    ]
    lines = [
        f"merged: LoRA style.safetensors (SHA-256 {digests[0][:16]}), weight -0.5, into 5 layers",
        f"merged: LoRA other.safetensors (SHA-256 {digests[1][:16]}), weight 1, into 2 layers",
    ]
    assert [note for note in notes if note.startswith("merged")] == lines
    capsys.readouterr()
    assert run(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {line}\n" in shown for line in lines)
    with ditc.load(bundle.path) as pipe:
        assert pipe.latents([1, 2], seed=0).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("loras", [(), ("style.safetensors",)])
def test_what_an_earlier_compile_left_is_not_taken_for_other_weights(
    loras: tuple[str, ...], home: Path, merged: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what lies in the folder of exports, nor in the work folder of a compile that was interrupted."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    exports = tmp_path / "exports"
    shutil.copytree(home / "exports", exports)
    (first,) = ((path.name, graphs(path)) for path in exports.glob("export-*"))
    monkeypatch.setattr(driver, "select", stop)
    for number, names in enumerate((("style.safetensors:0.8",), loras)):
        with pytest.raises(KeyboardInterrupt):
            compiled(home, tmp_path / "b", *names, exports=exports)
        (left,) = (tmp_path / ".b.work").glob("export-*")
        assert (graphs(left) == first[1]) == (number == 0)
        assert (exports / first[0]).is_dir()
        assert len([*exports.glob("export-*")]) == 1 + number


def test_gradients_are_those_of_the_merged_weights(home: Path, tmp_path: Path) -> None:
    """The model is loaded once more for them, with its LoRA: another one would be refused there."""
    options = OPTIONS.model_copy(update={"ranges": "fisher"})
    bundle = compiled(home, tmp_path / "b", "style.safetensors:0.8", options=options, exports=home / "exports")
    assert bundle.manifest.asked.ranges == "fisher"


def test_from_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"compile digits --steps 4 --precision fp32 --vc none --verify-images 1 -o {tmp_path / 'b'}".split()
    digits = load_model("digits")
    file = write(tmp_path / "style:2.safetensors", peft(pairs_for(digits, ["blocks.1.mlp.fc2"], size=0.01)))
    assert run([*arguments, "--lora", f"{file}:0.5", "--lora", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    loras = json.loads(printed.out)["manifest"]["model"]["loras"]
    assert [(lora["file"], lora["weight"], lora["layers"]) for lora in loras] == [
        ("style:2.safetensors", 0.5, 1),
        ("style:2.safetensors", 1.0, 1),
    ]
    assert printed.err.count("merged: LoRA style:2.safetensors") == 2
    assert "states no alpha" in printed.err


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("{home}/style.safetensors:strong", "'strong' is no number"),
        ("{home}/style.safetensors:0", "would change nothing"),
        ("{home}/none.safetensors", "no such LoRA"),
        ("{home}/mine.pt", "is no LoRA"),
        ("{home}/style.safetensors", "has other shapes than the model: layers "),
    ],
)
def test_a_lora_that_can_not_be_is_one_line_and_exit_code_2(
    lora: str, says: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "--lora", lora.format(home=home), "-o", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_a_model_object_takes_none(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"into an object merge them before, with .*with_loras\(model, loras\)"):
        compile_model(random_dit(CONFIG, "mine"), tmp_path / "b", PLAIN, loras=[home / "style.safetensors"])


def test_from_python_a_doubt_about_one_is_a_warning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise InputError("stopped here")

    monkeypatch.setattr(driver, "make_plan", stop)
    reading = {"num_heads": 4, "facts": FACTS, "loras": [Lora(home / "style.safetensors", 500)]}
    with pytest.warns(DoubtWarning) as warned, pytest.raises(InputError, match="stopped here"):
        compile_model(str(home / "mine.pt"), tmp_path / "b", PLAIN, **reading)
    assert any("times their own size" in str(each.message) for each in warned)


def test_tune_compiles_every_candidate_with_them_and_keeps_trials_apart(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, judged = [], []

    def compiled(*_: Any, loras: Any, **__: Any) -> None:
        read.append(loras)

    def trial(_: Any, stage: str, changes: dict[str, str], *__: Any) -> Trial:
        judged.append(changes)
        numbers = dict.fromkeys(("seconds", "psnr_db", "psnr_low"), 30.0)
        return Trial(stage=stage, changes=changes, worse_by=None, worse_high=None, size_bytes=1, within=True, **numbers)

    monkeypatch.setattr(candidates, "compile_model", compiled)
    monkeypatch.setattr(candidates, "trial_of", trial)
    monkeypatch.setattr(tuning.shutil, "rmtree", lambda _: None)  # trials stay, as where a search is interrupted
    options, base_options = TuneOptions(least_psnr_db=1, intervals=(2, 3)), CompileOptions(precision="fp32")
    counts = []
    for lora in ("style.safetensors", "style.safetensors", "style.safetensors:2", "other.safetensors"):
        tuning.tune_model("a.pt", tmp_path / "b", base_options, options, force=True, loras=[f"{home}/{lora}"])
        counts.append(len(judged))
    assert set(read) == {
        (Lora(home / "style.safetensors"),),
        (Lora(home / "style.safetensors", 2.0),),
        (Lora(home / "other.safetensors"),),
    }
    assert counts == [counts[0], counts[0], 2 * counts[0], 3 * counts[0]]


def test_peers_in_torch_take_the_lora_of_a_bundle(
    home: Path, merged: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = f"bench {merged.path} --requests 1 --warmup 0 --json".split()
    against = [*bench, "--against", "torch-f32", "--heads", "4", "--model"]
    lora = ["--lora", f"{home}/style.safetensors:0.8"]
    assert run([*against, str(home / "mine.pt")]) == 2
    assert "compiled from with --model, and with --lora style.safetensors" in capsys.readouterr().err
    assert run([*against, str(home / "mine.pt"), *lora]) == 0
    assert "torch-f32" in json.loads(capsys.readouterr().out)["against"]["peers"]
    assert run([*against, str(home / "by-hand" / "mine.pt")]) == 0  # whose weights are the same
    capsys.readouterr()
    assert run([*bench, *lora]) == 2
    assert "--lora is about peers; name some with --against" in capsys.readouterr().err
