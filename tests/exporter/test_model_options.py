"""Every option about a model at every kind of model: it changes what is read, or is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from ditc.errors import InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.model_facts import FACT_OPTIONS, ModelFacts
from ditc.exporter.models import load_model
from ditc.exporter.protocol import example_inputs
from tests.models import pixart

MODULE = """
import torch
from ditc.exporter.dit import DiTConfig
from ditc.exporter.models import random_dit


def build():
    return random_dit(DiTConfig(input_size=8, hidden_size=64, depth=1, num_heads=4, num_classes=4), "own")


def with_decoder():
    model = build()
    model.decoder = torch.nn.Conv2d(4, 3, 1)
    return model


def with_fixed_decoder():
    class Fixed(type(build())):
        decoder = property(lambda self: None, lambda self, value: None)

    return Fixed(build().config, "fixed")
"""


def write_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).save_pretrained(folder)
    return folder


def write_folder(folder: Path, *, scheduler: bool, vae: bool) -> str:
    torch.manual_seed(0)
    DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=4,
    ).save_pretrained(folder / "transformer")
    if scheduler:
        DDIMScheduler().save_pretrained(folder / "scheduler")
    if vae:
        write_vae(folder / "vae")
    return str(folder)


def write_pixart(folder: Path, *, bare: bool) -> str:
    pixart.saved("sigma", folder)
    if bare:
        shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "vae")
    return str(folder)


def write_file(path: Path) -> str:
    torch.manual_seed(0)
    torch.save(DiT(DiTConfig(input_size=8, hidden_size=384, depth=1, num_heads=6, num_classes=4)).state_dict(), path)
    return str(path)


KINDS: dict[str, Callable[[Path], str]] = {
    "built in": lambda _: "digits",
    "random": lambda _: "random:dit-s-8-256",
    "user's own": lambda _: "mine:build",
    "user's own with a decoder": lambda _: "mine:with_decoder",
    "user's own with a decoder that can't be set": lambda _: "mine:with_fixed_decoder",
    "file": lambda folder: write_file(folder / "mine.pt"),
    "folder": lambda folder: write_folder(folder / "bare", scheduler=False, vae=False),
    "folder with a scheduler": lambda folder: write_folder(folder / "scheduled", scheduler=True, vae=False),
    "folder with a VAE": lambda folder: write_folder(folder / "whole", scheduler=True, vae=True),
    "folder of a PixArt": lambda folder: write_pixart(folder / "pixart", bare=True),
    "folder of a PixArt with a scheduler": lambda folder: write_pixart(folder / "pixart-scheduled", bare=False),
}
# option -> what it states; in every file and folder here it is something else by itself
OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "--heads": lambda _: {"num_heads": 4},
    "--vae": lambda folder: {"vae": write_vae(folder / "a-vae")},
    "--classes": lambda _: {"facts": ModelFacts(classes=5)},
    "--no-null": lambda _: {"facts": ModelFacts(null_class=False)},
    "--prediction": lambda _: {"facts": ModelFacts(prediction="v")},
    "--flow-times": lambda _: {"facts": ModelFacts(prediction="flow", flow_times="1:0")},
    "--beta-schedule": lambda _: {"facts": ModelFacts(beta_schedule="squared-cosine")},
    "--train-steps": lambda _: {"facts": ModelFacts(train_steps=400)},
    "--text-tokens": lambda _: {"facts": ModelFacts(text_tokens=5)},
    "--size": lambda _: {"facts": ModelFacts(size=(96, 64))},
}
PROCESS = {"--prediction", "--beta-schedule", "--train-steps"}
TAKEN = {
    "built in": set(),
    "random": {"--vae"},
    "user's own": {"--vae"},
    "user's own with a decoder": set(),
    "user's own with a decoder that can't be set": set(),
    "file": set(OPTIONS) - {"--text-tokens", "--size"},
    "folder": {"--vae", *PROCESS},
    "folder with a scheduler": {"--vae"},
    "folder with a VAE": set(),
    "folder of a PixArt": {"--vae", "--text-tokens", "--size", *PROCESS},
    "folder of a PixArt with a scheduler": {"--vae", "--text-tokens", "--size"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "mine.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def names(home: Path) -> dict[str, str]:
    """Every kind of model, as a command line names it."""
    return {kind: write(home) for kind, write in KINDS.items()}


@pytest.fixture(scope="module")
def stated(home: Path) -> dict[str, dict[str, Any]]:
    """Return the fact that every option states, as `load_model` takes it."""
    return {option: state(home) for option, state in OPTIONS.items()}


@pytest.fixture(autouse=True)
def own_module(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def behaviour(model: Any) -> tuple[Any, ...]:
    """Return all of a model that ends in a bundle: its spec, its output, whether it has a decoder."""
    spec = model.spec.model_copy(update={"assumptions": (), "doubts": ()})
    x, _, *conditions = example_inputs(spec, 2)
    with torch.no_grad():
        out = model(x, torch.tensor([9.0, 500.0]), *conditions)
    return spec, out.sum().item(), type(model.decoder)


def test_the_options_are_all_there_are() -> None:
    assert set(OPTIONS) == {"--heads", "--vae", *FACT_OPTIONS}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_option_changes_what_is_read_or_is_refused(
    kind: str, option: str, names: dict[str, str], stated: dict[str, dict[str, Any]]
) -> None:
    if option in TAKEN[kind]:
        assert behaviour(load_model(names[kind], **stated[option])) != behaviour(load_model(names[kind]))
        return
    with pytest.raises(InputError) as caught:
        load_model(names[kind], **stated[option])
    message = str(caught.value)
    assert option in message.partition("leave out ")[2]
    assert "\n" not in message


def test_several_useless_options_are_named_together() -> None:
    with pytest.raises(InputError, match="leave out --heads and --classes and --train-steps"):
        load_model("digits", num_heads=4, facts=ModelFacts(classes=10, train_steps=1000))


def test_heads_that_a_folder_states_are_refused_though_they_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="states num_attention_heads; leave out --heads"):
        load_model(write_folder(tmp_path / "f", scheduler=True, vae=False), num_heads=4)


def test_what_was_assumed_of_a_vae_stands_with_the_rest(tmp_path: Path) -> None:
    vae = write_vae(tmp_path / "vae")
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    spec = load_model(write_file(tmp_path / "mine.pt"), vae=vae).spec
    assert spec.assumptions[-1] == "of the VAE the weights of the variant fp16 are meant, no others are in vae"
    assert len(spec.assumptions) == 4
