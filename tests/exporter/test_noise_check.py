"""One forward pass says whether a model predicts noise; trained weights raise no doubt, other meanings do."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditc.exporter.dit import DiT, DiTConfig, initialize_weights
from ditc.exporter.facts import ModelFacts
from ditc.exporter.models import builtin_digits, load_model, random_model
from ditc.exporter.noise_check import NUMBERS, doubts_about, noise_resemblance

DIGITS = str(files("ditc.exporter") / "digits.safetensors")


def digits_file(folder: Path, sign: float = 1.0) -> str:
    """The built-in weights as a file of a user's; `sign` multiplies what the model returns."""
    tensors = load_file(DIGITS)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[key] = sign * tensors[key]
    save_file(tensors, folder / "mine.safetensors")
    return str(folder / "mine.safetensors")


def test_trained_weights_raise_no_doubt(tmp_path: Path) -> None:
    model = load_model(digits_file(tmp_path), num_heads=4)
    assert model.spec.doubts == ()
    assert noise_resemblance(model) > 0.99


def test_negated_weights_do(tmp_path: Path) -> None:
    (line,) = load_model(digits_file(tmp_path, -1), num_heads=4).spec.doubts
    assert "returns nothing like it (cosine -1.00" in line
    assert "(--prediction)" in line
    assert "flow matching" in line


@pytest.mark.parametrize(("prediction", "meaning"), [("v", "not v"), ("sample", "not the clean sample")])
def test_noise_that_is_said_to_be_something_else_does(prediction: str, meaning: str, tmp_path: Path) -> None:
    facts = ModelFacts(prediction=prediction)  # type: ignore[arg-type]
    (line,) = load_model(digits_file(tmp_path), num_heads=4, facts=facts).spec.doubts
    assert "it seems to predict noise, " + meaning in line
    assert "(--prediction)" in line


def test_a_flow_matching_model_does(tmp_path: Path) -> None:
    """One that takes t in [0, 1]: its embedding of 999 is of nothing that it was trained on."""
    torch.manual_seed(0)
    torch.save(DiT(DiTConfig(input_size=8, hidden_size=384, depth=2, num_heads=6)).state_dict(), tmp_path / "sit.pt")
    (line,) = load_model(str(tmp_path / "sit.pt")).spec.doubts
    assert "flow matching" in line


def test_untrained_weights_that_return_zeros_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, hidden_size=384, depth=1, num_heads=6))
    initialize_weights(model)
    torch.save(model.state_dict(), tmp_path / "new.pt")
    assert "cosine 0.00" in load_model(str(tmp_path / "new.pt")).spec.doubts[0]


def test_a_model_that_returns_no_numbers_does() -> None:
    model = builtin_digits()
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(float("inf"))
    assert "nan" in doubts_about(model, "")[0]


def test_models_that_are_no_files_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model("digits").spec.doubts == ()
    assert load_model("random:dit-s-8-256").spec.doubts == ()
    (tmp_path / "mine.py").write_text(
        "from ditc.exporter.models import random_model\ndef build():\n    return random_model('dit-s-8-256', depth=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_model("mine:build").spec.doubts == ()


class Counted(nn.Module):
    """Returns the noise itself, and keeps what it was asked."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.spec = model.spec
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x, t))
        return x


@pytest.mark.parametrize(("model", "rows"), [(builtin_digits, NUMBERS // 64), (lambda: random_model("dit-s-8-256"), 1)])
def test_it_is_one_forward_pass_of_few_rows_at_the_largest_timestep(model: object, rows: int) -> None:
    counted = Counted(model())  # type: ignore[operator]
    assert doubts_about(counted, "") == ()
    ((x, t),) = counted.calls
    assert len(x) == rows
    assert t.tolist() == [999.0] * rows


def test_a_folder_s_doubt_names_the_key_that_says_otherwise(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, norm_num_groups=4, sample_size=8
    ).save_pretrained(tmp_path / "transformer")
    (line,) = load_model(str(tmp_path)).spec.doubts
    assert "(--prediction)" in line
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (line,) = load_model(str(tmp_path)).spec.doubts
    assert "(prediction_type in scheduler_config.json)" in line
