"""The canonical DiT: the architecture of the original release, and its seams."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn

from ditc.exporter.dit import DiT, DiTConfig, TimestepEmbedder, config_for_size, initialize_weights, sincos_positions
from ditc.exporter.protocol import TrajectoryModel

CONFIGS = {
    "original": DiTConfig(input_size=8, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=5),
    "no-sigma": DiTConfig(
        input_size=8,
        patch_size=4,
        in_channels=3,
        hidden_size=48,
        depth=1,
        num_heads=3,
        num_classes=5,
        learn_sigma=False,
    ),
    "diffusers": DiTConfig(
        input_size=8,
        hidden_size=64,
        depth=2,
        num_heads=2,
        num_classes=5,
        qkv_bias=False,
        freq_shift=1,
        norm2_eps=1e-2,
        embedder_per_block=True,
    ),
}


def model_of(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    return DiT(config, name="tiny").eval()


def inputs_of(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    side, generator = config.input_size, torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, side, side, generator=generator)
    return x, torch.tensor([999.0, 400.0, 1.0]), torch.tensor([0, 4, 5])


@pytest.mark.parametrize(("dim", "grid"), [(64, 4), (384, 16), (1152, 32)])
def test_positions_are_those_of_diffusers(dim: int, grid: int) -> None:
    expected = get_2d_sincos_pos_embed(dim, grid, base_size=grid, output_type="pt")
    torch.testing.assert_close(sincos_positions(dim, grid)[0], expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_features_are_those_of_diffusers(freq_shift: int) -> None:
    embedder = TimestepEmbedder(DiTConfig(hidden_size=64, freq_shift=freq_shift))
    embedder.mlp = nn.Identity()
    t = torch.tensor([0.0, 1.0, 17.0, 999.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)
    torch.testing.assert_close(embedder(t), expected, rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_pass_is_the_composition_of_the_seams(name: str) -> None:
    model = model_of(CONFIGS[name])
    x, t, y = inputs_of(model.config)
    modulation = model.condition(t, y)["modulation"]
    own_step_of_each_row = modulation[torch.arange(3), torch.arange(3)]
    rows = model.unpack({"modulation": own_step_of_each_row})
    h = model.embed(x)
    for branch in model.branches:
        h = branch.merge(h, branch.compute(h, rows), rows)
    torch.testing.assert_close(model.head(h, rows), model(x, t, y), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_condition_gives_a_table_per_step_and_image(name: str) -> None:
    model = model_of(CONFIGS[name])
    tables = model.condition(torch.tensor([900.0, 5.0]), torch.tensor([0, 3, 5]))
    config = model.config
    assert {key: tuple(table.shape) for key, table in tables.items()} == {
        "modulation": (2, 3, 6 * config.depth + 2, config.hidden_size)
    }
    alone = model.condition(torch.tensor([5.0]), torch.tensor([3]))["modulation"]
    torch.testing.assert_close(tables["modulation"][1:, 1:2], alone)


@torch.no_grad()
def test_every_part_of_the_output_depends_on_time_and_label() -> None:
    model = model_of(CONFIGS["original"])
    x, t, y = inputs_of(model.config)
    out = model(x, t, y)
    for other in (model(x, t - 1, y), model(x, t, (y + 1) % 5), model(x + 0.1, t, y)):
        assert ((other - out).abs().amax(dim=(2, 3)) > 1e-6).all()


@torch.no_grad()
def test_a_branch_enters_the_stream_through_the_gate_of_the_current_step() -> None:
    model = model_of(CONFIGS["original"])
    h, out, gate = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.randn(2, 1, 64)
    rows = [torch.full((2, 1, 64), float("nan"))] * 14
    for index, row in enumerate((2, 5, 8, 11)):
        gated = [gate if i == row else other for i, other in enumerate(rows)]
        torch.testing.assert_close(model.branches[index].merge(h, out, gated), h + gate * out)


@torch.no_grad()
def test_zero_initialised_gates_leave_the_network_silent() -> None:
    model = model_of(CONFIGS["original"])
    x, t, y = inputs_of(model.config)
    assert model(x, t, y).abs().max() > 0
    initialize_weights(model)
    assert model(x, t, y).abs().max() == 0


def test_the_spec_says_what_the_runtime_has_to_know() -> None:
    spec = model_of(CONFIGS["original"]).spec
    assert (spec.name, spec.family) == ("tiny", "dit")
    assert (spec.latent_shape, spec.out_channels, spec.cfg_channels) == ((4, 8, 8), 8, 4)
    assert (spec.num_classes, spec.null_label) == (5, 5)
    assert spec.branches == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    assert spec.branch_shape == (16, 64)
    assert spec.diffusion.learned_sigma
    assert spec.latent_scale is None


def test_a_model_without_learned_variance_returns_as_many_channels_as_it_takes() -> None:
    model = model_of(CONFIGS["no-sigma"])
    assert model.spec.out_channels == 3
    assert model(*inputs_of(model.config)).shape == (3, 3, 8, 8)


def test_dit_fits_the_protocol() -> None:
    assert isinstance(model_of(CONFIGS["original"]), TrajectoryModel)


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_released_sizes_have_the_parameters_that_the_paper_states(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(config_for_size(size, 2, 256))
    assert model.spec.parameters == pytest.approx(millions * 1e6, rel=0.01)
