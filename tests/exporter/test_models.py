"""From what a user names to a model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ditc.errors import CheckpointError, InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.models import builtin_digits, load_model, random_dit, random_model
from ditc.exporter.protocol import check_decomposition


def test_the_smallest_released_size_is_built_whole() -> None:
    spec = random_model("dit-s-8-256").spec
    assert spec.name == "dit-s-8-256-random"
    assert spec.latent_shape == (4, 32, 32)
    assert spec.branch_shape == (16, 384)
    assert len(spec.branches) == 24
    assert spec.num_classes == 1000


@pytest.mark.parametrize(
    ("size", "latent", "tokens", "width", "heads"),
    [
        ("dit-s-2-256", 32, 256, 384, 6),
        ("dit-b-4-256", 32, 64, 768, 12),
        ("dit-l-8-512", 64, 64, 1024, 16),
        ("dit-xl-2-512", 64, 1024, 1152, 16),
    ],
)
def test_a_size_says_patch_pixels_and_width(size: str, latent: int, tokens: int, width: int, heads: int) -> None:
    model = random_model(size, depth=1)
    assert model.spec.latent_shape == (4, latent, latent)
    assert model.spec.branch_shape == (tokens, width)
    assert model.config.num_heads == heads
    assert model.spec.branches == ("blocks.0.attn", "blocks.0.mlp")


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (random_model("dit-s-8-256", seed=seed, depth=1) for seed in (1, 1, 2))
    assert torch.equal(first.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


@torch.no_grad()
def test_a_random_model_has_any_size() -> None:
    config = DiTConfig(input_size=6, patch_size=3, in_channels=2, hidden_size=24, depth=3, num_heads=2, num_classes=4)
    first, again, other = (random_dit(config, "own size", seed=seed) for seed in (1, 1, 2))
    assert (first.spec.name, first.spec.branch_shape, len(first.spec.branches)) == ("own size", (4, 24), 6)
    weights = [model.blocks[2].mlp.fc1.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    check_decomposition(first)


def test_no_gate_of_a_random_model_is_closed() -> None:
    model = random_model("dit-s-8-256", depth=2)
    rows = model.condition(torch.tensor([500.0]), torch.tensor([7]))["modulation"][0, 0]
    assert (rows[[2, 5, 8, 11]].abs().amax(dim=1) > 0.01).all()


@pytest.mark.parametrize("size", ["dit-z-2-256", "dit-xl-3-256", "dit-xl-2-300", "xl-2-256", "dit-xl-2-256-extra", ""])
def test_an_unknown_size_lists_the_form(size: str) -> None:
    with pytest.raises(InputError) as caught:
        random_model(size)
    message = str(caught.value)
    assert repr(size) in message
    assert "dit-(s|b|l|xl)-(2|4|8)-(256|512)" in message
    assert "dit-xl-2-256" in message


def test_the_built_in_model_is_small_and_knows_ten_digits() -> None:
    model = builtin_digits()
    spec = model.spec
    assert (spec.name, spec.num_classes, spec.null_label) == ("digits", 10, 10)
    assert spec.latent_shape == (1, 8, 8)
    assert spec.branch_shape[0] == 16
    assert spec.parameters < 2_000_000
    assert spec.diffusion.learned_sigma
    assert spec.sampler.variance == "learned"
    assert model.decoder is None
    check_decomposition(model)


def test_the_built_in_weights_are_a_small_file() -> None:
    assert len((files("ditc.exporter") / "digits.safetensors").read_bytes()) < 5_000_000


def test_digits_names_the_built_in_model() -> None:
    named, built_in = load_model("digits").state_dict(), builtin_digits().state_dict()
    assert named.keys() == built_in.keys()
    assert all(torch.equal(named[key], built_in[key]) for key in built_in)


def test_a_path_names_a_checkpoint(tmp_path: Path) -> None:
    model = DiT(DiTConfig(input_size=8, hidden_size=48, depth=1, num_heads=3, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    loaded = load_model(str(tmp_path / "mine.pt"), num_heads=3)
    assert loaded.spec.name == "mine"
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_folder_names_a_diffusers_model(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, norm_num_groups=4, sample_size=8
    ).save_pretrained(tmp_path / "mine")
    spec = load_model(str(tmp_path / "mine")).spec
    assert (spec.name, spec.branches) == ("mine", ("blocks.0.attn", "blocks.0.mlp"))


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere", "nowhere/at.all", "digit"])
def test_a_name_that_stands_for_nothing_says_what_would(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(name)
    message = str(caught.value)
    assert name in message
    assert "expected a .pt or .safetensors file or a diffusers folder" in message
    assert "\n" not in message


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a diffusers folder"):
        load_model(str(tmp_path))
