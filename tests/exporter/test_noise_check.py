"""Two forward passes say whether a model predicts noise; trained weights raise no doubt, other meanings do."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditc.diffusion import alphas_cumprod
from ditc.exporter.dit import DiT, DiTConfig, initialize_weights
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.models import builtin_digits, load_model, random_model
from ditc.exporter.noise_check import LEVEL, NUMBERS, doubts_about, noise_resemblance, noisy_timestep
from ditc.spec import DiffusionSpec, ModelSpec

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


class Exact(nn.Module):
    """The best predictor for classes of one sample each: of noise over the betas, or of a flow with scaled times."""

    def __init__(self, spec: ModelSpec, clean: Tensor, kind: str) -> None:
        super().__init__()
        self.spec, self.clean, self.kind = spec, clean, kind

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        clean = self.clean[y]
        if self.kind == "flow":
            return (x - clean) / (t[:, None, None, None] / self.spec.diffusion.train_steps)
        products = torch.from_numpy(alphas_cumprod(self.spec.diffusion)).float()[t.long()][:, None, None, None]
        return (x - products.sqrt() * clean) / (1 - products).sqrt()


PROCESSES = [
    DiffusionSpec(),
    DiffusionSpec(beta_schedule="scaled-linear", beta_start=8.5e-4, beta_end=1.2e-2),
    DiffusionSpec(beta_schedule="squared-cosine"),
    DiffusionSpec(train_steps=400, beta_start=2.5e-4, beta_end=5e-2),
]


def exact(diffusion: DiffusionSpec, scale: float, kind: str) -> Exact:
    """`scale` is the size of clean samples, of which 1 is as large as the noise."""
    spec = builtin_digits().spec.model_copy(update={"diffusion": diffusion})
    clean = scale * torch.randn(spec.num_classes, *spec.latent_shape, generator=torch.Generator().manual_seed(1))
    return Exact(spec, clean, kind)


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("diffusion", PROCESSES, ids=lambda spec: f"{spec.beta_schedule}-{spec.train_steps}")
def test_a_flow_with_timesteps_of_the_same_range_is_told_from_noise_by_its_size(
    diffusion: DiffusionSpec, scale: float
) -> None:
    flow, noise = exact(diffusion, scale, "flow"), exact(diffusion, scale, "noise")
    assert doubts_about(noise, "") == ()
    assert noise_resemblance(flow) > 0.6
    (line,) = doubts_about(flow, "")
    assert "it may be made for flow matching with timesteps of the same range" in line


def trained(kind: str) -> DiT:
    """A small model after a few steps on four noisy classes."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=4, hidden_size=64, depth=1, num_heads=4, num_classes=4, learn_sigma=False))
    initialize_weights(model)
    clean, products = 0.7 * torch.randn(4, 4, 4, 4), torch.from_numpy(alphas_cumprod(DiffusionSpec())).float()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        y = torch.randint(0, 4, (64,))
        x0, noise, t = (
            clean[y] + 0.2 * torch.randn(64, 4, 4, 4),
            torch.randn(64, 4, 4, 4),
            torch.randint(0, 1000, (64,)),
        )
        alpha_bar, time = products[t][:, None, None, None], (t / 1000)[:, None, None, None]
        flow = kind == "flow"
        x = (1 - time) * x0 + time * noise if flow else alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        loss = ((model(x, t.float(), y) - (noise - x0 if flow else noise)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_models_after_a_short_training_are_told_apart_too() -> None:
    assert doubts_about(trained("noise"), "") == ()
    assert "flow matching" in doubts_about(trained("flow"), "")[0]


@pytest.mark.parametrize("diffusion", PROCESSES, ids=lambda spec: f"{spec.beta_schedule}-{spec.train_steps}")
def test_the_middle_timestep_is_the_first_of_its_noise_level(diffusion: DiffusionSpec) -> None:
    products = alphas_cumprod(diffusion)
    t = noisy_timestep(diffusion)
    assert t is not None
    assert products[t] <= LEVEL + 1e-6 < products[t - 2]


def test_a_process_that_hardly_adds_noise_is_looked_at_once() -> None:
    weak = DiffusionSpec(beta_start=1e-6, beta_end=1e-5)
    assert noisy_timestep(weak) is None
    counted = Counted(builtin_digits())
    counted.spec = counted.spec.model_copy(update={"diffusion": weak})
    assert doubts_about(counted, "") == ()
    assert len(counted.calls) == 1


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
    (tmp_path / "noise_of_mine.py").write_text(
        "from ditc.exporter.models import random_model\ndef build():\n    return random_model('dit-s-8-256', depth=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_model("noise_of_mine:build").spec.doubts == ()


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
def test_it_is_two_forward_passes_of_few_rows(model: object, rows: int) -> None:
    counted = Counted(model())  # type: ignore[operator]
    assert doubts_about(counted, "") == ()
    (x, t), (weak, middle) = counted.calls
    assert len(x) == len(weak) == rows
    assert t.tolist() == [999.0] * rows
    assert middle.tolist() == [475.0] * rows
    assert weak.std() < 0.6 * x.std()


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
